"""Knows how long work is told in lines, for logs; knows no terminal."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from moecli.units import format_bandwidth, format_nbytes, format_wait

if TYPE_CHECKING:
    from moecli.hub.client import RemoteFile
    from moecli.hub.pulling import Pull
    from quant.job import ConversionProgress

_PERCENT = 10  # between two lines
_SECONDS = 15.0


class PullLines:
    """A line for every ten percent."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}  # by file name
        self._here = self._began = self._total = self._told = 0
        self._time = time.monotonic()

    def begin(self, wanted: "Pull") -> None:
        self._total = wanted.nbytes
        self._here = self._began = wanted.nbytes - wanted.missing_nbytes
        self._told = self._percent

    def update(self, file: "RemoteFile", nbytes: int) -> None:
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


class ConversionLines:
    """A line for every ten percent, and now and then where that takes long."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._percent = 0
        self._time = time.monotonic()

    def update(self, now: "ConversionProgress") -> None:
        percent = 100 * now.done_nbytes // max(now.total_nbytes, 1)
        step = percent // _PERCENT - self._percent // _PERCENT
        if step > 0 or (percent > self._percent and self._waited()):
            self._percent = percent
            line = f"quantizing: {percent}%, error {now.error:.2%}, {time_left(now)}"
            self._tell(line.rstrip(", "))

    def arrived(self, nbytes: int) -> None:
        if self._waited():
            self._tell(f"downloading: {format_nbytes(nbytes)} so far")

    def _waited(self) -> bool:
        return time.monotonic() - self._time >= _SECONDS

    def _tell(self, line: str) -> None:
        self._say(line)
        self._time = time.monotonic()


def time_left(now: "ConversionProgress") -> str:
    return "" if now.eta_s is None else f"{format_wait(now.eta_s)} left"
