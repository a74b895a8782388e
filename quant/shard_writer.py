"""Knows how to write a file from front to back with a running checksum, and to take it up again."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import QuantError
from quant.safetensors_file import write_fully

_HASH_NBYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failures of the file system into ones that a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "make room; the same command then continues where it stopped"
        elif error.errno in _FORBIDDEN:
            hint = "choose another place for the output"
        else:
            hint = "the same command continues where it stopped"
        raise QuantError(f"cannot write `{path}`: {error.strerror}", hint) from error


class ShardWriter:
    """Appends to a file; `digest` is the SHA-256 of all bytes up to `position`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._hash = hashlib.sha256()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    @property
    def digest(self) -> str:
        return self._hash.copy().hexdigest()

    def resume(self, marks: list[tuple[int, str]]) -> int:
        """Keep what agrees with the (end, digest) marks of earlier work; the rest is cut off.

        Returns how many marks hold.
        """
        held = 0
        for end, digest in marks:
            ahead = self._hash.copy()
            if not self._hash_range(ahead, self.position, end) or ahead.hexdigest() != digest:
                break
            self._hash, self.position = ahead, end
            held += 1
        os.ftruncate(self._descriptor, self.position)
        os.lseek(self._descriptor, self.position, os.SEEK_SET)
        return held

    def write(self, data: bytes | memoryview) -> None:
        write_fully(self._descriptor, data)
        self._hash.update(data)
        self.position += len(data)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _hash_range(self, digest: "hashlib._Hash", start: int, end: int) -> bool:
        """Hash bytes that are in the file; False when it is shorter."""
        while start < end:
            block = os.pread(self._descriptor, min(_HASH_NBYTES, end - start), start)
            if not block:
                return False
            digest.update(block)
            start += len(block)
        return True
