"""Knows how whole files are hashed while units fill them: what is complete from the first byte on,
by a thread of its own, so that little is left to hash when the last unit is written.
"""

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from quant.shard_writer import ShardWriter, writing
from quant.shards import PlacedUnit

_READ_NBYTES = 1 << 18  # stays in the nearer caches until it is hashed
_LOT_NBYTES = 16 << 20


class FileDigests:
    """SHA-256 of files, whose units are finished in any order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._going_on: Future[None] | None = None
        self._files: dict[int, _Front] = {}
        self._given_up = threading.Event()

    def __enter__(self) -> "FileDigests":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def add(self, writer: ShardWriter, placed: PlacedUnit) -> None:
        """The bytes of a unit are in its file.

        Raises QuantError when bytes that were added before could not be read.
        """
        front = self._files.get(placed.shard)
        if front is None:
            front = self._files[placed.shard] = _Front(writer, self._given_up)
        front.add(placed)
        if front.waiting_nbytes >= _LOT_NBYTES and (
            self._going_on is None or self._going_on.done()
        ):
            self._wait()
            self._going_on = self._pool.submit(front.catch_up)

    def take(self, number: int) -> str:
        """Of file `number`, all of whose units were added; raises QuantError as `add`."""
        self._wait()
        self._files[number].catch_up()
        return self._files[number].digest.hexdigest()

    def _wait(self) -> None:
        going_on, self._going_on = self._going_on, None
        if going_on is not None:
            going_on.result()


class _Front:
    """How far a file is complete, and how far it is hashed."""

    def __init__(self, writer: ShardWriter, given_up: threading.Event) -> None:
        self.digest = hashlib.sha256()
        self._writer = writer
        self._given_up = given_up
        self._ends: dict[int, int] = {}  # of units behind one that is missing, by their number
        self._number = 0  # of the first unit that is missing
        self._complete = self._hashed = 0

    @property
    def waiting_nbytes(self) -> int:
        return self._complete - self._hashed

    def add(self, placed: PlacedUnit) -> None:
        self._ends[placed.number] = placed.offset + placed.unit.nbytes
        while self._number in self._ends:
            self._complete = self._ends.pop(self._number)
            self._number += 1

    def catch_up(self) -> None:
        memory = memoryview(bytearray(_READ_NBYTES))
        with writing(self._writer.path):
            while self._hashed < self._complete and not self._given_up.is_set():
                wanted = memory[: min(_READ_NBYTES, self._complete - self._hashed)]
                count = self._writer.read_into(wanted, self._hashed)
                assert count, f"`{self._writer.path}` is shorter than what was written to it"
                self.digest.update(wanted[:count])
                self._hashed += count
