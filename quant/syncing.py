"""Knows how finished work is put beyond the reach of a power failure while more is being made."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from quant.journal import Journal
from quant.shard_writer import ShardWriter, writing

# At most twice this much is written again after a power failure; a kill loses none.
_SYNC_NBYTES = 256 << 20


class Syncing:
    """Files first, then the journal that records what is in them, on a thread of its own: the disk
    works while threads quantize.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._pool = ThreadPoolExecutor(1)
        self._going_on: Future[None] | None = None
        self._unsynced: set[ShardWriter] = set()
        self._nbytes = 0

    def __enter__(self) -> "Syncing":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def add(self, writer: ShardWriter, nbytes: int) -> None:
        """So many finished bytes are in a file; from time to time they are sent to the disk.

        Raises QuantError when an earlier lot could not be written.
        """
        self._unsynced.add(writer)
        self._nbytes += nbytes
        if self._nbytes >= _SYNC_NBYTES:
            self.begin()

    def begin(self) -> None:
        """Send what is finished to the disk, when what was sent before is there."""
        self.wait()
        self._going_on = self._pool.submit(_sync, self._unsynced, self._journal)
        self._unsynced, self._nbytes = set(), 0

    def wait(self) -> None:
        """Return when all that was sent is there; raises QuantError when it cannot be written."""
        going_on, self._going_on = self._going_on, None
        if going_on is not None:
            going_on.result()


def _sync(writers: set[ShardWriter], journal: Journal) -> None:
    for writer in writers:
        with writing(writer.path):
            writer.sync()
    with writing(journal.path):
        journal.sync()
