"""Knows how bytes get into device memory beside running kernels; not which bytes, nor where to.

Kernels are asynchronous: who launched one and goes on does not know that it has ended. So whoever
is done with a piece of device memory leaves a mark among the kernels, and the copy that overwrites
the piece waits for the mark, on the device.
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from offload.copy2d import CopyRuns
from offload.host import HostArena
from offload.pieces import Piece, copy_pieces
from offload.pinning import CudaPinner, Pinner

if TYPE_CHECKING:
    import torch

Mark = object  # a point in the order of the kernels launched; what is one, its Transfer knows


class Transfer(Protocol):
    def mark(self) -> Mark:
        """The point that the kernels launched so far by this thread lead up to."""
        ...

    def copy(
        self,
        target: "torch.Tensor",
        source: "torch.Tensor",
        after: Mark | None,
        pieces: Sequence[Piece],
    ) -> None:
        """`pieces` of uint8 [n] in main memory to uint8 [n] on the device, after `after`.

        Returns when the bytes are there; kernels that run meanwhile go on. Several threads may
        copy at once.
        """
        ...

    def close(self) -> None: ...


class HostTransfer:
    """The simulated device's: its kernels have ended when they return."""

    def mark(self) -> Mark:
        return None

    def copy(
        self,
        target: "torch.Tensor",
        source: "torch.Tensor",
        after: Mark | None,
        pieces: Sequence[Piece],
    ) -> None:
        copy_pieces(target, source, pieces)

    def close(self) -> None:
        pass


class CudaTransfer:
    """A stream of its own for copies, which overlap with kernels where main memory is pinned.

    All kernels that read what is copied run on one other stream, the current one of who marks.
    What is not pinned goes through a pinned buffer of `bounce_nbytes`, the longest copy there may
    be: taking a second copy in main memory is faster than the driver's own way in small pieces.
    """

    def __init__(
        self, device: "torch.device | str", bounce_nbytes: int, pinner: Pinner | None = None
    ) -> None:
        import torch

        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._bounce_nbytes = bounce_nbytes
        self._pinner = pinner or CudaPinner(self._device)
        self._copy_runs = CopyRuns()
        self._bounce: HostArena | None = None  # made when first needed
        self._bounce_lock = threading.Lock()

    def mark(self) -> Mark:
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(
        self,
        target: "torch.Tensor",
        source: "torch.Tensor",
        after: Mark | None,
        pieces: Sequence[Piece],
    ) -> None:
        if source.is_pinned():
            self._copy(target, source, after, pieces)
            return
        with self._bounce_lock:
            self._copy(target, self._bounced(source, pieces), after, pieces)

    def _copy(
        self,
        target: "torch.Tensor",
        source: "torch.Tensor",
        after: Mark | None,
        pieces: Sequence[Piece],
    ) -> None:
        import torch

        done = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
        with torch.cuda.stream(self._stream):
            if after is not None:
                assert isinstance(after, torch.cuda.Event), f"no mark: {after!r}"
                self._stream.wait_event(after)
            for piece in pieces:
                if piece.runs == 1:
                    piece.of(target).copy_(piece.of(source), non_blocking=True)
                else:
                    self._copy_runs(piece.of(target), piece.of(source), self._stream)
            done.record(self._stream)
        done.synchronize()

    def _bounced(self, source: "torch.Tensor", pieces: Sequence[Piece]) -> "torch.Tensor":
        """These bytes in the buffer; it is free again once they are copied from there."""
        import torch

        if self._bounce is None:
            self._bounce = HostArena(self._bounce_nbytes, self._bounce_nbytes)
            self._bounce.pin(self._pinner)  # if refused, the driver bounces what we did
        with self._bounce.buffer(0) as buffer:
            bounced = torch.frombuffer(buffer, dtype=torch.uint8)[: source.numel()]
        copy_pieces(bounced, source, pieces)
        return bounced

    def close(self) -> None:
        with self._bounce_lock:
            if self._bounce is not None:
                self._bounce.close()
                self._bounce = None
