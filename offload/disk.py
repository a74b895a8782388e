"""Knows in which file, and where in it, each expert's bytes lie, and reads them; caches nothing."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.errors import OffloadError
from offload.keys import ExpertKey, describe

_REPLACE_HINT = "the model directory is damaged or was changed: make it again"


@dataclass(frozen=True)
class ExpertSpan:
    """The bytes of one expert: `nbytes` of `path` from `offset` on."""

    path: Path
    offset: int
    nbytes: int


class DiskTier:
    """Every expert of a model, in files that stay open. Reads may run in several threads at once.

    `drop_cache` asks the system after each read to forget the pages it has just copied: the host
    arena holds them already, so keeping both would spend the memory twice. Leave it off where
    memory beyond the budget is idle: there the page cache answers many misses.

    Raises OffloadError when a file is missing or a span does not lie inside its file.
    """

    def __init__(self, spans: Mapping[ExpertKey, ExpertSpan], drop_cache: bool = False) -> None:
        assert spans, "a disk tier without experts"
        self._spans = dict(spans)
        self._drop_cache = drop_cache and hasattr(os, "posix_fadvise")
        self._files: dict[Path, int] = {}
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise

    def _open_files(self) -> None:
        sizes: dict[Path, int] = {}
        for key, span in self._spans.items():
            if span.path not in self._files:
                self._files[span.path], sizes[span.path] = _open(span.path)
            assert span.offset >= 0, f"{describe(key)} begins before its file: {span}"
            assert span.nbytes > 0, f"{describe(key)} has no bytes: {span}"
            end, size = span.offset + span.nbytes, sizes[span.path]
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

        Raises OffloadError, naming file and expert, when the file ends early or cannot be read;
        what the buffer then holds is undefined.
        """
        span = self._span(key)
        assert self._files, "the disk tier is closed"
        file = self._files[span.path]
        with buffer[: span.nbytes] as target:
            assert target.nbytes == span.nbytes, f"{describe(key)} does not fit its buffer"
            done = 0
            while done < span.nbytes:
                try:
                    count = os.preadv(file, [target[done:]], span.offset + done)
                except OSError as error:
                    raise OffloadError(
                        f"cannot read {describe(key)} from `{span.path}`: {error.strerror}",
                        "check the disk, then the file",
                    ) from error
                if count == 0:
                    raise OffloadError(
                        f"`{span.path}` ends inside {describe(key)}: {done} of {span.nbytes} bytes",
                        _REPLACE_HINT,
                    )
                done += count
        if self._drop_cache:
            os.posix_fadvise(file, span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)
        return span.nbytes

    def close(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file)


def _open(path: Path) -> tuple[int, int]:
    """A descriptor and the file's size."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise OffloadError(f"cannot open `{path}`: {error.strerror}", _REPLACE_HINT) from error
    return file, os.fstat(file).st_size
