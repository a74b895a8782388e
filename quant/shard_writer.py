"""Knows how to write runs of bytes of a file at their places, in any order, and to check them."""

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
    """A file of `nbytes` bytes in the end; until then it has holes, which take no room."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._descriptor).st_size > nbytes:
            os.ftruncate(self._descriptor, nbytes)

    def begin(self, offset: int) -> None:
        """What is written next goes to `offset` and on."""
        self._hash = hashlib.sha256()
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def write(self, data: bytes | memoryview) -> None:
        write_fully(self._descriptor, data)
        self._hash.update(data)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written since `begin`."""
        return self._hash.hexdigest()

    def digest_of(self, start: int, end: int) -> str:
        """SHA-256 of what is in the file; of less where the file is shorter."""
        digest = hashlib.sha256()
        while start < end:
            block = os.pread(self._descriptor, min(_HASH_NBYTES, end - start), start)
            if not block:
                break
            digest.update(block)
            start += len(block)
        return digest.hexdigest()

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
