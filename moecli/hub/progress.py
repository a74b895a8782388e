"""Knows how a download is told in lines, for logs; knows no terminal."""

import threading
import time
from collections.abc import Callable

from moecli.hub.client import RemoteFile
from moecli.hub.pulling import Pull
from moecli.units import format_bandwidth, format_nbytes, format_wait

_PERCENT = 10  # between two lines


class PullLines:
    """A line for every ten percent."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}  # by file name
        self._here = self._began = self._total = self._told = 0
        self._time = time.monotonic()

    def begin(self, wanted: Pull) -> None:
        self._total = wanted.nbytes
        self._here = self._began = wanted.nbytes - wanted.missing_nbytes
        self._told = self._percent

    def update(self, file: RemoteFile, nbytes: int) -> None:
        with self._lock:
            self._here += nbytes - self._done.get(file.name, nbytes)
            self._done[file.name] = nbytes
            if self._percent // _PERCENT > self._told // _PERCENT:
                self._told = self._percent
                self._say(f"pulling: {self._percent}%, {self._sizes()}{self._rate()}")

    @property
    def _percent(self) -> int:
        return 100 * self._here // max(self._total, 1)

    def _sizes(self) -> str:
        return f"{format_nbytes(self._here)} of {format_nbytes(self._total)}"

    def _rate(self) -> str:
        rate = (self._here - self._began) / max(time.monotonic() - self._time, 1e-3)
        if rate <= 0:
            return ""
        left = format_wait((self._total - self._here) / rate)
        return f", {format_bandwidth(rate)}, {left} left"
