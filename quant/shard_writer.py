"""Knows how to write runs of bytes of a file at their places, in any order, and to check them."""

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import QuantError
from quant.safetensors_file import write_fully

_READ_NBYTES = 1 << 18
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
        self.checksum = 0  # CRC-32 of what was written since `begin`
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._descriptor).st_size > nbytes:
            os.ftruncate(self._descriptor, nbytes)

    def begin(self, offset: int) -> None:
        """What is written next goes to `offset` and on."""
        self.checksum = 0
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def write(self, data: bytes | memoryview) -> None:
        write_fully(self._descriptor, data)
        self.checksum = zlib.crc32(data, self.checksum)

    def read_into(self, memory: memoryview, offset: int) -> int:
        """How many bytes were read: less than asked for where the file is shorter."""
        return os.preadv(self._descriptor, [memory], offset)

    def checksum_of(self, start: int, end: int) -> int:
        """CRC-32 of what is in the file; of less where the file is shorter."""
        checksum = 0
        memory = memoryview(bytearray(_READ_NBYTES))
        while start < end:
            count = self.read_into(memory[: min(_READ_NBYTES, end - start)], start)
            if not count:
                break
            checksum = zlib.crc32(memory[:count], checksum)
            start += count
        return checksum

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
