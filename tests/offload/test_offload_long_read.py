"""Long reads in pieces, by several threads."""

import mmap
import os
import threading
from pathlib import Path

import pytest

import offload.disk
from offload.disk import DiskTier, ExpertSpan
from offload.errors import OffloadError
from offload.long_read import LongRead
from offload.workers import Workers
from tests.offload.test_offload_threads import wait_until

PAGE = 4096


@pytest.mark.parametrize("nbytes", [1, PAGE, 2 * PAGE + 1, 7 * PAGE - 1, 8 * PAGE])
@pytest.mark.parametrize("direct", [False, True])
def test_an_expert_is_read_in_pieces_and_nothing_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, direct: bool
) -> None:
    monkeypatch.setattr(offload.disk, "PIECE_NBYTES", 2 * PAGE)
    content = os.urandom(12 * PAGE)
    (tmp_path / "f").write_bytes(content)
    real, lengths = os.preadv, []

    def noted(file: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(len(buffers[0]))
        return real(file, buffers, offset)

    disk = DiskTier({(0, 0): ExpertSpan(tmp_path / "f", PAGE, nbytes)}, drop_cache=direct)
    monkeypatch.setattr(os, "preadv", noted)
    with mmap.mmap(-1, 16 * PAGE) as block, memoryview(block) as buffer:
        assert disk.read_into((0, 0), buffer) == nbytes
        assert buffer[:nbytes] == content[PAGE : PAGE + nbytes]
        end = -(-nbytes // PAGE) * PAGE if disk.direct else nbytes
        assert not any(buffer[end:]), "read beyond the end"
    assert len(lengths) == -(-nbytes // (2 * PAGE))
    assert max(lengths) <= 2 * PAGE
    disk.close()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_pieces_are_shared_and_each_is_read_once(num_workers: int) -> None:
    workers = Workers(num_workers, "test")
    together = threading.Barrier(num_workers + 1, timeout=20)
    read: list[tuple[int, int]] = []

    def one(begin: int, end: int) -> None:
        together.wait()  # passes only when all threads have a piece
        read.append((begin, end))

    LongRead(8 * num_workers + 5, 8, one).run(workers)
    starts = range(0, 8 * num_workers + 5, 8)
    assert sorted(read) == [(i, min(i + 8, 8 * num_workers + 5)) for i in starts]
    workers.close()


@pytest.mark.parametrize("fails", ["worker", "caller"])
def test_an_error_is_raised_when_nobody_reads_any_more(fails: str) -> None:
    """Otherwise the slot could get its next expert while a late piece of this one arrives."""
    workers = Workers(1, "test")
    caller = threading.current_thread()
    both = threading.Barrier(2, timeout=20)
    ended: list[str] = []

    def one(begin: int, end: int) -> None:
        both.wait()
        if (threading.current_thread() is caller) == (fails == "caller"):
            raise OffloadError("the disk is gone")
        wait_until(lambda: not pieces._left)  # the error is known
        ended.append("late")

    pieces = LongRead(100, 1, one)
    with pytest.raises(OffloadError, match="the disk is gone"):
        pieces.run(workers)
    assert ended == ["late"]
    workers.close()


def test_an_interrupt_waits_for_the_others_and_begins_no_more() -> None:
    workers = Workers(1, "test")
    caller = threading.current_thread()
    both = threading.Barrier(2, timeout=20)
    begun: list[int] = []

    def one(begin: int, end: int) -> None:
        begun.append(begin)
        both.wait()
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        wait_until(lambda: not pieces._left)
        begun.append(-1)

    pieces = LongRead(100, 1, one)
    with pytest.raises(KeyboardInterrupt):
        pieces.run(workers)
    assert sorted(begun) == [-1, 0, 1]
    workers.close()


def test_a_truncated_file_is_told_from_a_piece_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.disk, "PIECE_NBYTES", PAGE)
    path = tmp_path / "f"
    path.write_bytes(bytes(8 * PAGE))
    disk = DiskTier({(0, 0): ExpertSpan(path, 0, 8 * PAGE)}, drop_cache=True)
    os.truncate(path, 5 * PAGE + 10)
    with (
        mmap.mmap(-1, 8 * PAGE) as block,
        memoryview(block) as buffer,
        pytest.raises(OffloadError, match="ends inside expert 0 of layer 0"),
    ):
        disk.read_into((0, 0), buffer)
    disk.close()
