"""Knows when experts are being read, and can make the disk slower than it is."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.disk import DiskTier
from offload.keys import ExpertKey

_READ = DiskTier.read_into


class Watch:
    """Notes every read of every disk tier while it is on.

    `most_bw`: bytes a second that the disk gives at most, one read after the other; None: as it is.
    """

    def __init__(self, most_bw: float | None = None) -> None:
        self._most_bw = most_bw
        self._free_at = 0.0
        self._lock = threading.Lock()
        self._reads: list[tuple[float, float]] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Forgets what was noted before."""
        self._reads = []

        def read(disk: DiskTier, key: ExpertKey, buffer: memoryview) -> int:
            begin = time.perf_counter()
            nbytes = _READ(disk, key, buffer)
            self._wait(begin, nbytes)
            with self._lock:
                self._reads.append((begin, time.perf_counter()))
            return nbytes

        DiskTier.read_into = read  # type: ignore[method-assign]
        try:
            yield
        finally:
            DiskTier.read_into = _READ  # type: ignore[method-assign]

    def _wait(self, begin: float, nbytes: int) -> None:
        """As long as a disk would take that reads one after the other."""
        if self._most_bw is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, begin) + nbytes / self._most_bw
            end = self._free_at
        time.sleep(max(0.0, end - time.perf_counter()))

    def idle_seconds(self, begin: float, end: float) -> float:
        """Of this time, how long nothing was being read."""
        idle, now = 0.0, begin
        for first, last in sorted(self._reads):
            idle += max(0.0, min(first, end) - now)
            now = max(now, min(last, end))
        return idle + max(0.0, end - now)


def read_nbytes() -> int:
    """What this process has had from a disk so far, the page cache left out."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
