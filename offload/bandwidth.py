"""Knows how to measure how fast bytes come from memory, disk and over the link; keeps nothing.

Each measurement takes well under a second. None, or a note in the result, where this system
cannot do it.
"""

import ctypes
import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.errors import OffloadError

_BLOCK_NBYTES = 4 << 20
_DISK_THREADS = 4  # as many reads in flight as a request with several misses has
_MEASURE_S = 0.4


@dataclass(frozen=True)
class DiskBandwidth:
    """Bytes a second of large reads. If not `direct`, the page cache may have answered some."""

    bytes_per_s: float
    direct: bool
    nbytes: int  # that were read


def measure_ram(threads: int = 1, nbytes: int = 256 << 20) -> float | None:
    """Bytes a second that `threads` threads together read; None without a C library to ask."""
    if _memcmp() is None:
        return None
    with RamBlock(threads, nbytes) as block:
        return max(block.read() for _ in range(3))


class RamBlock:
    """A block of memory, far larger than caches if it is to tell something, that threads read.

    Two equal halves are compared: reads only, by the fastest instructions that the C library knows.
    Raises OffloadError without a C library to ask. Close it.
    """

    def __init__(self, threads: int, nbytes: int) -> None:
        assert threads >= 1, f"{threads} threads"
        memcmp = _memcmp()
        if memcmp is None:
            raise OffloadError("this system has no memcmp to read memory with")
        self._memcmp, self._threads = memcmp, threads
        self._share = nbytes // (2 * threads) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map = mmap.mmap(-1, 2 * self._share * threads)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(anchor)
        del anchor  # an export that outlived this line would keep the block from being unmapped
        # Untouched pages would all be one page of zeros.
        ctypes.memset(self._base, 1, len(self._map))

    def read(self) -> float:
        """All of it once, by all threads; returns bytes a second."""
        half = self._share * self._threads

        def read(i: int) -> None:
            at = self._base + i * self._share
            assert self._memcmp(at, at + half, self._share) == 0, "memory changed meanwhile"

        return 2 * half / _timed(read, self._threads)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> "RamBlock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _memcmp() -> Callable[[int, int, int], int] | None:
    try:
        library = ctypes.CDLL(None)  # its calls release the GIL
        library.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    except (OSError, TypeError, AttributeError):
        return None
    return library.memcmp


def _timed(task: Callable[[int], None], num_threads: int) -> float:
    """Seconds for `task(0)` ... `task(n - 1)` at once, this thread taking one."""
    others = [threading.Thread(target=task, args=(i,)) for i in range(1, num_threads)]
    begin = time.perf_counter()
    for thread in others:
        thread.start()
    task(0)
    for thread in others:
        thread.join()
    return time.perf_counter() - begin


def measure_disk(path: Path, nbytes: int = 256 << 20) -> DiskBandwidth:
    """How fast the disk under `path` is read, past the page cache where the system allows.

    A file is read itself, at most `nbytes` of it; in a directory a temporary file is written first
    and removed. Raises OffloadError when that fails.
    """
    try:
        if not path.is_dir():
            return _measure_file(path, nbytes)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".moecli-") as file:
            _fill(file.fileno(), nbytes)
            return _measure_file(Path(file.name), nbytes)
    except OSError as error:
        raise OffloadError(f"cannot measure the disk at `{path}`: {error.strerror}") from error


def _fill(file: int, nbytes: int) -> None:
    """Write up to `nbytes`, or as much as half a second allows, and see it on the disk."""
    block = os.urandom(_BLOCK_NBYTES)  # some disks compress
    end = time.perf_counter() + _MEASURE_S
    done = 0
    while done < nbytes and (done == 0 or time.perf_counter() < end):
        done += os.write(file, block)
        os.fsync(file)


def _measure_file(path: Path, nbytes: int) -> DiskBandwidth:
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return _read_file(path, nbytes, flag)
    except OSError as error:
        if not flag or error.errno != errno.EINVAL:
            raise
        return _read_file(path, nbytes, 0)  # a file system without direct reads


def _read_file(path: Path, nbytes: int, flag: int) -> DiskBandwidth:
    file = os.open(path, os.O_RDONLY | flag)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return _read_blocks(file, min(nbytes, os.fstat(file).st_size), bool(flag))
    finally:
        os.close(file)


def _read_blocks(file: int, nbytes: int, direct: bool) -> DiskBandwidth:
    block = min(_BLOCK_NBYTES, max(4096, nbytes // 4096 * 4096))
    offsets = iter(range(0, max(1, nbytes - block + 1), block))
    counts = [0] * _DISK_THREADS
    errors: list[OSError] = []
    end = time.perf_counter() + _MEASURE_S

    def read(i: int) -> None:
        with mmap.mmap(-1, block) as target:  # page-aligned, as direct reads want it
            for offset in offsets:
                try:
                    counts[i] += os.preadv(file, [target], offset)
                except OSError as error:
                    errors.append(error)
                    return
                if time.perf_counter() > end:
                    return

    seconds = _timed(read, _DISK_THREADS)
    if errors:
        raise errors[0]
    return DiskBandwidth(sum(counts) / seconds, direct, sum(counts))


def measure_link(nbytes: int = 256 << 20) -> float | None:
    """Bytes a second copied from pinned memory to the current CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # [nbytes]
    target = torch.empty_like(source, device="cuda")  # [nbytes]
    return nbytes / _device_seconds(lambda: target.copy_(source, non_blocking=True))


def measure_zero_copy(nbytes: int = 256 << 20) -> float | None:
    """Bytes a second that a kernel of the current CUDA device reads from pinned memory.

    None without a device, and where it cannot address main memory.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.zeros(nbytes // 8, dtype=torch.int64, pin_memory=True)  # [nbytes / 8]
    try:
        seen = torch.as_tensor(_OnDevice(source.data_ptr(), len(source)), device="cuda")
    except RuntimeError:
        return None
    if seen.data_ptr() != source.data_ptr():
        return None  # it was copied
    # An operation on every element, and no copy: that would be left to the copy engine.
    target = torch.empty_like(seen)  # [nbytes / 8], in VRAM
    return nbytes / _device_seconds(lambda: torch.bitwise_not(seen, out=target))


class _OnDevice:
    """int64 numbers at an address, as torch takes them for a CUDA tensor."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (count,),
            "typestr": "<i8",
            "version": 3,
        }


def measure_vram(nbytes: int = 256 << 20) -> float | None:
    """Bytes a second that the current CUDA device reads and writes in VRAM; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.zeros(nbytes // 16, dtype=torch.int64, device="cuda")  # [nbytes / 16]
    target = torch.empty_like(source)
    return nbytes / _device_seconds(lambda: torch.bitwise_not(source, out=target))


def _device_seconds(task: Callable[[], object]) -> float:
    """The least that `task` took on the current CUDA device, when the first run has warmed it."""
    import torch

    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        task()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def measure_compute(compute: Callable[[], int]) -> float:
    """Bytes, or operations, a second of what `compute` works through, by the best of several runs.

    It returns how many of them one run took; what they mean is the caller's business.
    """
    compute()  # warms caches, threads and lazily loaded code
    best = 0.0
    end = time.perf_counter() + _MEASURE_S
    while not best or time.perf_counter() < end:
        begin = time.perf_counter()
        nbytes = compute()
        best = max(best, nbytes / (time.perf_counter() - begin))
    return best
