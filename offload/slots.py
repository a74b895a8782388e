"""Knows one block of device memory, cut into slots of equal size; not what lies in them.

On the device "cpu" it is the simulated device of the tests: same calls, same promises.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from offload.errors import OffloadError
from offload.pieces import Piece
from offload.transfer import CudaTransfer, HostTransfer, Mark, Transfer

if TYPE_CHECKING:
    import torch


class DeviceSlots(Protocol):
    """What the manager asks of a device."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_nbytes(self) -> int: ...

    def copy_in(self, slot: int, source: memoryview) -> int:
        """Fill a slot from main memory; on return the bytes are there and `source` is free.

        Returns how many bytes that were: a device may ask for a part of them only.

        The kernels that were launched before `released` have read what was there.
        """
        ...

    def released(self, slots: Iterable[int]) -> None:
        """No further kernel will be launched that reads these slots as they are."""
        ...

    def address(self, slot: int) -> int:
        """Where a slot begins in the device's memory."""
        ...

    def holds(self, slot: int, expected: memoryview) -> bool:
        """Whether a slot has what `copy_in` takes of these bytes, for checks."""
        ...

    def close(self) -> None: ...


class SlotPool:
    """`num_slots` slots in one allocation of exact size on a torch device; it never grows.

    `pieces` says what of an expert is copied, to the place in the slot that it has in the expert;
    None: all of it. Copies into different slots may run in several threads. Raises OffloadError
    when the device has not that much memory.
    """

    def __init__(
        self,
        num_slots: int,
        slot_nbytes: int,
        device: "torch.device | str",
        transfer: Transfer | None = None,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        import torch

        assert num_slots >= 1, "a device tier without slots"
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self._pieces = pieces
        nbytes = num_slots * slot_nbytes
        try:
            self._block = torch.empty(nbytes, dtype=torch.uint8, device=device)  # [num_slots * S]
        except torch.OutOfMemoryError as error:
            raise OffloadError(
                f"`{device}` has no {nbytes / 2**30:.2f} GiB free for experts",
                "give a smaller budget with `--vram`",
            ) from error
        if transfer is None:
            on_cuda = self._block.is_cuda
            transfer = CudaTransfer(device, slot_nbytes) if on_cuda else HostTransfer()
        self._transfer = transfer
        self._last_reads: dict[int, Mark] = {}  # slot -> where its last release was
        # The allocator may have given us what kernels still use that were launched before.
        self.released(range(num_slots))

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes

    def _slot(self, slot: int, nbytes: int) -> "torch.Tensor":
        assert 0 <= slot < self.num_slots, f"no slot {slot}"
        assert 0 < nbytes <= self.slot_nbytes, f"{nbytes} bytes in a slot of {self.slot_nbytes}"
        return self._block.narrow(0, slot * self.slot_nbytes, nbytes)  # [nbytes]

    def _pieces_of(self, nbytes: int) -> Sequence[Piece]:
        return (Piece(0, nbytes),) if self._pieces is None else self._pieces

    def copy_in(self, slot: int, source: memoryview) -> int:
        import torch

        target = self._slot(slot, source.nbytes)
        source_bytes = torch.frombuffer(source, dtype=torch.uint8)
        pieces = self._pieces_of(source.nbytes)
        self._transfer.copy(target, source_bytes, self._last_reads[slot], pieces)
        return sum(piece.total_nbytes for piece in pieces)

    def released(self, slots: Iterable[int]) -> None:
        mark = self._transfer.mark()
        for slot in slots:
            self._last_reads[slot] = mark

    def address(self, slot: int) -> int:
        return self._slot(slot, self.slot_nbytes).data_ptr()

    def holds(self, slot: int, expected: memoryview) -> bool:
        import torch

        found = self._slot(slot, expected.nbytes).cpu()  # [nbytes]
        wanted = torch.frombuffer(expected, dtype=torch.uint8)
        pieces = self._pieces_of(expected.nbytes)
        return all(torch.equal(piece.of(found), piece.of(wanted)) for piece in pieces)

    def close(self) -> None:
        """Give the memory back; every address of it is dead from here on."""
        self._transfer.close()
        self._block = self._block.new_empty(0)
