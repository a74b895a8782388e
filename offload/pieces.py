"""Knows which pieces of an expert's bytes a copy to the device takes; not what they mean."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A run of its own costs a copy engine about a line of memory beyond its bytes.
RUN_GAP_NBYTES = 128
# Setting up one more copy takes some microseconds, in which a link moves about as much.
GAP_NBYTES = 64 << 10


@dataclass(frozen=True)
class Piece:
    """`runs` runs of `nbytes`, `pitch` from the beginning of one to that of the next."""

    offset: int
    nbytes: int
    runs: int = 1
    pitch: int = 0

    @property
    def end(self) -> int:
        return self.offset + (self.runs - 1) * self.pitch + self.nbytes

    @property
    def total_nbytes(self) -> int:
        return self.runs * self.nbytes

    def of(self, blob: "torch.Tensor") -> "torch.Tensor":
        """A view of this piece, uint8 [runs, nbytes], of contiguous bytes."""
        assert self.end <= blob.numel(), f"a piece that ends at {self.end} of {blob.numel()} bytes"
        start = blob.storage_offset() + self.offset
        return blob.as_strided((self.runs, self.nbytes), (self.pitch, 1), start)


def worth_copying(wanted: Iterable[Piece]) -> tuple[Piece, ...]:
    """The pieces to copy so that all `wanted` ones, given in their order, are among them.

    Runs that lie close together come with what is between them, and so do such pieces.
    """
    found: list[Piece] = []
    for piece in wanted:
        if piece.runs > 1 and piece.pitch - piece.nbytes < RUN_GAP_NBYTES:
            piece = Piece(piece.offset, piece.end - piece.offset)
        last = found[-1] if found else None
        near = last is not None and piece.offset - last.end < GAP_NBYTES
        if last is not None and near and last.runs == piece.runs == 1:
            found[-1] = replace(last, nbytes=piece.end - last.offset)
        else:
            found.append(piece)
    return tuple(found)


def copy_pieces(target: "torch.Tensor", source: "torch.Tensor", pieces: Sequence[Piece]) -> None:
    """These pieces of `source`, uint8 [n], to where they lie in `target`, uint8 [n]."""
    for piece in pieces:
        piece.of(target).copy_(piece.of(source))
