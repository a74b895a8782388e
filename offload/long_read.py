"""Knows how one long read is shared among threads; not what is read."""

import threading
from collections import deque
from collections.abc import Callable

from offload.workers import Workers

Piece = tuple[int, int]  # where it begins and ends


class LongRead:
    """One read in pieces: whoever is free takes the next, the caller included.

    `read(begin, end)` reads a piece. The first error ends the whole; it is raised when no thread
    reads any more, so that the buffer is the caller's again.
    """

    def __init__(self, nbytes: int, piece_nbytes: int, read: Callable[[int, int], None]) -> None:
        starts = range(0, nbytes, piece_nbytes)
        self._left = deque((begin, min(begin + piece_nbytes, nbytes)) for begin in starts)
        self._read = read
        self._changed = threading.Condition()
        self._num_reading = 0
        self._error: BaseException | None = None

    def run(self, workers: Workers) -> None:
        """Read all, with the help of `workers`; returns when it is done."""
        try:
            for _ in range(min(workers.num_workers, len(self._left) - 1)):
                workers.submit(self._help)
            self._help()
        except BaseException as error:
            self._fail(error)  # an interrupt: nobody begins another piece
            raise
        finally:
            with self._changed:
                while self._num_reading:
                    self._changed.wait()
        if self._error is not None:
            raise self._error

    def _help(self) -> None:
        while (piece := self._next()) is not None:
            try:
                self._read(*piece)
            except Exception as error:  # noqa: BLE001  # raised by `run`
                self._fail(error)
            finally:
                with self._changed:
                    self._num_reading -= 1
                    self._changed.notify()

    def _next(self) -> Piece | None:
        with self._changed:
            if not self._left:
                return None
            self._num_reading += 1
            return self._left.popleft()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._left.clear()
            self._error = self._error or error
