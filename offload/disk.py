"""Knows in which file, and where in it, each expert's bytes lie, and reads them; caches nothing."""

import ctypes
import errno
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.errors import OffloadError
from offload.keys import ExpertKey, describe
from offload.long_read import LongRead
from offload.workers import Workers

_BLOCK = 4096  # what direct reads want offsets, lengths and addresses to be multiples of
PIECE_NBYTES = 4 << 20  # a larger expert is read in pieces, side by side
_READERS = 3  # threads that help with pieces
_REPLACE_HINT = "the model directory is damaged or was changed: make it again"


@dataclass(frozen=True)
class ExpertSpan:
    """The bytes of one expert: `nbytes` of `path` from `offset` on."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _File:
    descriptor: int
    size: int
    direct: bool


class DiskTier:
    """Every expert of a model, in files that stay open. Reads may run in several threads at once.

    An expert of several pieces is read by several threads: one alone leaves a fast disk waiting.

    `drop_cache` leaves nothing in the system's page cache, which would hold a second copy of what
    the host arena holds: right for a model that does not fit in memory anyway. Files are then read
    past the cache, which also is faster where the disk must answer; `direct` tells whether the file
    system can do that. Where it cannot, pages are dropped after each read. Leave it off where idle
    memory can keep the whole model: there the cache answers the misses.

    Raises OffloadError when a file is missing or a span does not lie inside its file.
    """

    def __init__(self, spans: Mapping[ExpertKey, ExpertSpan], drop_cache: bool = False) -> None:
        assert spans, "a disk tier without experts"
        self._spans = dict(spans)
        self._drop_cache = drop_cache
        self._files: dict[Path, _File] = {}
        self._readers = Workers(_READERS, "moecli-reads")
        aligned = all(span.offset % _BLOCK == 0 for span in self._spans.values())
        try:
            for key, span in self._spans.items():
                self._open(key, span, direct=drop_cache and aligned)
        except BaseException:
            self.close()
            raise

    def _open(self, key: ExpertKey, span: ExpertSpan, direct: bool) -> None:
        assert span.offset >= 0, f"{describe(key)} begins before its file: {span}"
        assert span.nbytes > 0, f"{describe(key)} has no bytes: {span}"
        if span.path not in self._files:
            try:
                self._files[span.path] = (direct and _open_direct(span.path)) or _open(span.path)
            except OSError as error:
                raise OffloadError(
                    f"cannot open `{span.path}`: {error.strerror}", _REPLACE_HINT
                ) from error
        end, size = span.offset + span.nbytes, self._files[span.path].size
        if end > size:
            raise OffloadError(
                f"`{span.path}` has {size} bytes, but {describe(key)} ends at byte {end}",
                _REPLACE_HINT,
            )

    @property
    def keys(self) -> list[ExpertKey]:
        return list(self._spans)

    @property
    def num_experts(self) -> int:
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts together."""
        return sum(span.nbytes for span in self._spans.values())

    @property
    def max_nbytes(self) -> int:
        """Bytes of the largest expert: what a slot must hold."""
        return max(span.nbytes for span in self._spans.values())

    @property
    def direct(self) -> bool:
        """Whether all reads go past the page cache."""
        return all(file.direct for file in self._files.values())

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._spans

    def nbytes_of(self, key: ExpertKey) -> int:
        return self._span(key).nbytes

    def _span(self, key: ExpertKey) -> ExpertSpan:
        span = self._spans.get(key)
        assert span is not None, f"{describe(key)} is in no file"
        return span

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        """Read an expert to the beginning of `buffer`; returns how many bytes it has.

        A direct read wants a page-aligned buffer of whole pages, and may fill the last one to its
        end. Raises OffloadError, naming file and expert, when the file ends early or cannot be
        read; what the buffer then holds is undefined.
        """
        span = self._span(key)
        assert self._files, "the disk tier is closed"
        file = self._files[span.path]
        length = -(-span.nbytes // _BLOCK) * _BLOCK if file.direct else span.nbytes
        with buffer[:length] as target:
            assert target.nbytes == length, f"{describe(key)} does not fit its buffer"
            assert not file.direct or _address(target) % _BLOCK == 0, "the buffer is not aligned"

            def read(begin: int, end: int) -> None:
                done, stop = begin, min(end, span.nbytes)
                while done < stop:
                    with target[done:end] as rest:  # released even if a traceback keeps this frame
                        done += _read_some(file, rest, key, span, done)

            if length <= PIECE_NBYTES:
                read(0, length)
            else:
                LongRead(length, PIECE_NBYTES, read).run(self._readers)
        if self._drop_cache and not file.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)
        return span.nbytes

    def close(self) -> None:
        self._readers.close()
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file.descriptor)


def _read_some(file: _File, target: memoryview, key: ExpertKey, span: ExpertSpan, done: int) -> int:
    """At least one byte of the rest of a span, as much as the system gives at once."""
    try:
        count = os.preadv(file.descriptor, [target], span.offset + done)
    except OSError as error:
        raise OffloadError(
            f"cannot read {describe(key)} from `{span.path}`: {error.strerror}",
            "check the disk, then the file",
        ) from error
    done += count
    # a direct read could not go on from within a block, and only the end of a file stops it there
    if count == 0 or (file.direct and done < span.nbytes and done % _BLOCK):
        raise OffloadError(
            f"`{span.path}` ends inside {describe(key)}: {done} of {span.nbytes} bytes",
            _REPLACE_HINT,
        )
    return count


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _open(path: Path) -> _File:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    return _File(descriptor, os.fstat(descriptor).st_size, direct=False)


def _open_direct(path: Path) -> _File | None:
    """None where system or file system cannot; tried, for some refuse only when asked to read."""
    if not hasattr(os, "O_DIRECT"):
        return None
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        with mmap.mmap(-1, _BLOCK) as page:
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return _File(descriptor, os.fstat(descriptor).st_size, direct=True)
