"""Knows one block of device memory, cut into slots of equal size; not what lies in them.

On the device "cpu" it is the simulated device of the tests: same calls, same promises.
"""

import ctypes
from typing import TYPE_CHECKING, Protocol

from offload.errors import OffloadError

if TYPE_CHECKING:
    import torch


class DeviceSlots(Protocol):
    """What the manager asks of a device."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_nbytes(self) -> int: ...

    def copy_in(self, slot: int, source: memoryview) -> None:
        """Fill a slot from main memory; on return the bytes are there and `source` is free."""
        ...

    def address(self, slot: int) -> int:
        """Where a slot begins in the device's memory."""
        ...

    def read_back(self, slot: int, nbytes: int) -> bytes:
        """The first bytes of a slot, for checks."""
        ...

    def close(self) -> None: ...


class SlotPool:
    """`num_slots` slots in one allocation of exact size on a torch device; it never grows.

    Raises OffloadError when the device has not that much memory.
    """

    def __init__(self, num_slots: int, slot_nbytes: int, device: "torch.device | str") -> None:
        import torch

        assert num_slots >= 1, "a device tier without slots"
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        nbytes = num_slots * slot_nbytes
        try:
            self._block = torch.empty(nbytes, dtype=torch.uint8, device=device)  # [num_slots * S]
        except torch.OutOfMemoryError as error:
            raise OffloadError(
                f"`{device}` has no {nbytes / 2**30:.2f} GiB free for experts",
                "give a smaller budget with `--vram`",
            ) from error

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes

    def _slot(self, slot: int, nbytes: int) -> "torch.Tensor":
        assert 0 <= slot < self.num_slots, f"no slot {slot}"
        assert 0 < nbytes <= self.slot_nbytes, f"{nbytes} bytes in a slot of {self.slot_nbytes}"
        return self._block.narrow(0, slot * self.slot_nbytes, nbytes)  # [nbytes]

    def copy_in(self, slot: int, source: memoryview) -> None:
        import torch

        target = self._slot(slot, source.nbytes)
        target.copy_(torch.frombuffer(source, dtype=torch.uint8))
        if target.is_cuda:
            torch.cuda.current_stream(target.device).synchronize()

    def address(self, slot: int) -> int:
        return self._slot(slot, self.slot_nbytes).data_ptr()

    def read_back(self, slot: int, nbytes: int) -> bytes:
        copy = self._slot(slot, nbytes).cpu()  # [nbytes]
        return ctypes.string_at(copy.data_ptr(), nbytes)

    def close(self) -> None:
        """Give the memory back; every address of it is dead from here on."""
        self._block = self._block.new_empty(0)
