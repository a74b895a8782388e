"""The disk tier: what opens, what is read, and what it says when it cannot."""

import errno
import mmap
import os
from pathlib import Path

import pytest

from offload.disk import DiskTier, ExpertSpan
from offload.errors import OffloadError
from tests.offload.offload_files import PAGE, ModelFiles


def test_reads_every_expert_and_nothing_beyond(files: ModelFiles) -> None:
    disk = files.disk()
    assert disk.num_experts == 18
    assert disk.nbytes == 18 * files.nbytes
    assert disk.max_nbytes == files.nbytes
    for key, blob in files.blobs.items():
        buffer = bytearray(b"\xaa" * files.slot_nbytes)
        assert disk.read_into(key, memoryview(buffer)) == files.nbytes
        assert buffer[: files.nbytes] == blob
        assert set(buffer[files.nbytes :]) == {0xAA}
    disk.close()


def test_short_reads_are_continued(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    real, counts = os.preadv, []

    def stingy(file: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(real(file, [buffers[0][:1999]], offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", stingy)
    buffer = bytearray(files.nbytes)
    files.disk().read_into((1, 2), memoryview(buffer))
    assert bytes(buffer) == files.blobs[1, 2]
    assert counts == [1999, 1999, 1002]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF])
def test_a_failing_read_names_file_and_expert(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def broken(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    disk = files.disk()
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OffloadError) as caught:
        disk.read_into((2, 3), memoryview(bytearray(files.nbytes)))
    assert "layer2.bin" in caught.value.message
    assert f"expert 3 of layer 2 from `{files.path(2)}`: {os.strerror(code)}" in str(caught.value)
    assert caught.value.hint


def test_a_file_truncated_after_it_was_opened(own_files: ModelFiles) -> None:
    disk = own_files.disk()
    os.truncate(own_files.path(1), own_files.spans[1, 2].offset)
    with pytest.raises(OffloadError, match=r"layer1\.bin` ends inside expert 2 of layer 1: 0 of"):
        disk.read_into((1, 2), memoryview(bytearray(own_files.nbytes)))
    disk.read_into((1, 1), memoryview(bytearray(own_files.nbytes)))


def test_a_file_that_is_too_short_does_not_open(own_files: ModelFiles) -> None:
    span = own_files.spans[2, 5]
    os.truncate(span.path, span.offset + span.nbytes - 1)
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OffloadError, match=r"layer2\.bin` has .* expert 5 of layer 2 ends at byte"):
        own_files.disk()
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_missing_file_does_not_open(own_files: ModelFiles) -> None:
    own_files.path(1).unlink()
    with pytest.raises(OffloadError, match=r"cannot open `.*layer1\.bin`: No such file"):
        own_files.disk()


def test_a_span_may_end_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "one.bin"
    path.write_bytes(b"x" * 10)
    disk = DiskTier({(0, 0): ExpertSpan(path, 3, 7)})
    buffer = bytearray(PAGE)
    assert disk.read_into((0, 0), memoryview(buffer)) == 7
    disk.close()
    with pytest.raises(OffloadError, match="ends at byte 11"):
        DiskTier({(0, 0): ExpertSpan(path, 3, 8)})


@pytest.mark.parametrize("span", [(-1, 5), (0, 0), (3, -2)])
def test_nonsense_spans_are_a_bug(tmp_path: Path, span: tuple[int, int]) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    with pytest.raises(AssertionError, match="expert 0 of layer 0"):
        DiskTier({(0, 0): ExpertSpan(tmp_path / "f", *span)})


def test_an_unknown_expert_or_a_small_buffer_is_a_bug(files: ModelFiles) -> None:
    disk = files.disk()
    with pytest.raises(AssertionError, match="expert 99 of layer 0 is in no file"):
        disk.read_into((0, 99), memoryview(bytearray(files.nbytes)))
    with pytest.raises(AssertionError, match="does not fit"):
        disk.read_into((0, 0), memoryview(bytearray(files.nbytes - 1)))
    disk.close()
    with pytest.raises(AssertionError, match="closed"):
        disk.read_into((0, 0), memoryview(bytearray(files.nbytes)))


def aligned_buffer(files: ModelFiles) -> memoryview:
    return memoryview(mmap.mmap(-1, files.slot_nbytes))


def test_direct_reads_are_aligned_and_give_the_same_bytes(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = files.disk(drop_cache=True)
    if not disk.direct:
        pytest.skip("the file system of the temporary folder has no direct reads")
    real, lengths = os.preadv, []

    def stingy(file: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % PAGE == 0
        lengths.append(len(buffers[0]))
        return real(file, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    for key, blob in files.blobs.items():
        buffer = aligned_buffer(files)
        assert disk.read_into(key, buffer) == files.nbytes
        assert buffer[: files.nbytes] == blob
    assert set(lengths) == {2 * PAGE, PAGE}
    with pytest.raises(AssertionError, match="does not fit"):
        disk.read_into((0, 0), aligned_buffer(files)[: files.nbytes])
    with pytest.raises(AssertionError, match="not aligned"):
        disk.read_into((0, 0), memoryview(mmap.mmap(-1, 3 * PAGE))[16:])
    disk.close()


@pytest.mark.parametrize("cut", [0, 100, PAGE, PAGE + 100])
def test_direct_reads_see_a_truncated_file(own_files: ModelFiles, cut: int) -> None:
    disk = own_files.disk(drop_cache=True)
    os.truncate(own_files.path(1), own_files.spans[1, 2].offset + cut)
    with pytest.raises(OffloadError, match=f"ends inside expert 2 of layer 1: {cut} of 5000"):
        disk.read_into((1, 2), aligned_buffer(own_files))
    disk.close()


def test_direct_reads_reach_an_end_that_is_not_aligned(own_files: ModelFiles) -> None:
    span = own_files.spans[2, 5]
    os.truncate(span.path, span.offset + span.nbytes)
    disk = own_files.disk(drop_cache=True)
    buffer = aligned_buffer(own_files)
    disk.read_into((2, 5), buffer)
    assert buffer[: own_files.nbytes] == own_files.blobs[2, 5]
    disk.close()


@pytest.mark.parametrize("refuses", ["open", "read", "span", "nothing"])
def test_without_direct_reads_pages_are_dropped(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    """A file system may refuse when opened or when read, and a span may lie askew."""
    real_open, real_read = os.open, os.preadv
    refused: list[int] = []

    def open_file(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "no")
        descriptor = real_open(path, flags)
        if flags & os.O_DIRECT and refuses == "read":
            refused.append(descriptor)
        return descriptor

    def read(file: int, buffers: list[memoryview], offset: int) -> int:
        if refused and file == refused[-1]:
            refused.clear()
            raise OSError(errno.EINVAL, "no")
        return real_read(file, buffers, offset)

    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: advised.append(rest))
    spans = dict(files.spans)
    if refuses == "span":
        spans[0, 0] = ExpertSpan(spans[0, 0].path, 8, 100)
    num_open = len(os.listdir("/proc/self/fd"))
    disk = DiskTier(spans, drop_cache=True)
    assert len(os.listdir("/proc/self/fd")) == num_open + files.layers
    buffer = aligned_buffer(files)
    disk.read_into((0, 1), buffer)
    assert buffer[: files.nbytes] == files.blobs[0, 1]
    span = files.spans[0, 1]
    expected = [] if disk.direct else [(span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)]
    assert advised == expected
    assert refuses == "nothing" or not disk.direct
    disk.close()


def test_the_page_cache_is_left_alone_unless_told(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fadvise", None)  # a call would raise
    disk = files.disk()
    assert not disk.direct
    disk.read_into((0, 1), memoryview(bytearray(files.nbytes)))
    disk.close()


def test_a_missing_file_is_told_for_direct_reads_too(own_files: ModelFiles) -> None:
    own_files.path(1).unlink()
    with pytest.raises(OffloadError, match=r"cannot open `.*layer1\.bin`: No such file"):
        own_files.disk(drop_cache=True)
