"""Knows one block of main memory, cut into slots of equal size; not what lies in them."""

import ctypes
import mmap

from offload.errors import OffloadError
from offload.pinning import Pinner

SLOT_ALIGNMENT = 4096
PIN_STEP_NBYTES = 1 << 30  # so much is lost at most between what is pinned and what could be


class HostArena:
    """As many whole slots as `nbytes` hold, in one page-aligned allocation that never grows.

    The system hands out a page when it is first written, so unused slots cost nothing yet.
    `hugepages` asks for large pages where the system has them (fewer TLB misses in kernels that
    stream through an expert). Raises OffloadError when the memory is not to be had.
    """

    def __init__(self, nbytes: int, slot_nbytes: int, hugepages: bool = True) -> None:
        aligned = slot_nbytes > 0 and slot_nbytes % SLOT_ALIGNMENT == 0
        assert aligned, f"slots of {slot_nbytes} bytes are no multiple of {SLOT_ALIGNMENT}"
        assert nbytes >= slot_nbytes, f"{nbytes} bytes hold no slot of {slot_nbytes}"
        self.num_slots = nbytes // slot_nbytes
        self.slot_nbytes = slot_nbytes
        self._map: mmap.mmap | None = _allocate(self.nbytes)
        if hugepages and hasattr(mmap, "MADV_HUGEPAGE"):
            _advise_hugepages(self._map)
        self._view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(anchor)
        del anchor  # an export that outlived this line would keep close() from unmapping
        self._pinner: Pinner | None = None
        self._pinned: list[int] = []  # where each registered piece begins
        self._device_addresses: list[int] = []  # of the pinned slots, which are the first ones

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes

    def buffer(self, slot: int) -> memoryview:
        """The bytes of a slot, writable; release it before the arena is closed."""
        assert self._map is not None, "the arena is closed"
        assert 0 <= slot < self.num_slots, f"no slot {slot}"
        start = slot * self.slot_nbytes
        return self._view[start : start + self.slot_nbytes]

    def address(self, slot: int) -> int:
        """Where a slot begins in this process' memory; valid until the arena is closed."""
        assert self._map is not None, "the arena is closed"
        assert 0 <= slot < self.num_slots, f"no slot {slot}"
        return self._base + slot * self.slot_nbytes

    def pin(self, pinner: Pinner, step_nbytes: int = PIN_STEP_NBYTES) -> int:
        """Pin slots from the first on, piece by piece until refused; returns how many are pinned.

        A refusal is no error: the slots above stay as they are. A piece holds whole slots, so that
        none is half pinned.
        """
        assert self._pinner is None, "the arena is pinned already"
        self._pinner = pinner
        step = max(1, step_nbytes // self.slot_nbytes)
        for first in range(0, self.num_slots, step):
            count = min(step, self.num_slots - first)
            start = self.address(first)
            if not pinner.register(start, count * self.slot_nbytes):
                break
            self._pinned.append(start)
            seen = pinner.device_address(start)
            self._device_addresses += [seen + i * self.slot_nbytes for i in range(count)]
        return self.pinned_slots

    @property
    def pinned_slots(self) -> int:
        return len(self._device_addresses)

    def device_address(self, slot: int) -> int:
        """Where the device that the arena is pinned for reads a slot; 0 if it cannot."""
        assert 0 <= slot < self.num_slots, f"no slot {slot}"
        return self._device_addresses[slot] if slot < self.pinned_slots else 0

    def close(self) -> None:
        """Give the memory back; every address and buffer of it is dead from here on."""
        self._device_addresses.clear()
        while self._pinned:
            assert self._pinner is not None
            self._pinner.unregister(self._pinned.pop())
        if self._map is not None:
            self._view.release()
            self._map.close()
            self._map = None


def pinnable_nbytes(pinner: Pinner, most: int) -> int:
    """Bytes of main memory that the system lets be pinned at once, in whole GiB, `most` at most.

    They are taken meanwhile, as an arena takes them, and given back: about a second for 4 GiB.
    """
    arenas: list[HostArena] = []
    pinned = 0
    try:
        while pinned + PIN_STEP_NBYTES <= most:
            arenas.append(HostArena(PIN_STEP_NBYTES, PIN_STEP_NBYTES))
            if not arenas[-1].pin(pinner):
                break
            pinned += PIN_STEP_NBYTES
        return pinned
    finally:
        for arena in arenas:
            arena.close()


def _allocate(nbytes: int) -> mmap.mmap:
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mmap.mmap(-1, nbytes)
    except (OSError, OverflowError) as error:
        raise OffloadError(
            f"the system refuses {nbytes / 2**30:.2f} GiB of memory for experts",
            "give a smaller budget with `--ram`",
        ) from error


def _advise_hugepages(block: mmap.mmap) -> None:
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without them: the advice was all there was to give
