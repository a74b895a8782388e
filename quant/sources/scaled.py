"""Knows matrices of small numbers, one an element, with scales for blocks of them.

A block is [rows, columns]: of one row for scales a group or a channel, of all rows for one scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.sources.packed import PackedTensor, misfit, require

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ScaledTensor(PackedTensor):
    """value = (code - zero point) * scale, in fp32 and rounded once. `parts` begins with codes."""

    scale: str
    block: tuple[int, int]
    zero_point: str | None = None  # shaped as the scales

    @property
    def codes(self) -> str:
        return self.parts[0]

    def check(self, stored: Checkpoint) -> None:
        codes, scale = require(stored, self.codes), require(stored, self.scale)
        if codes.dtype not in CODES or len(codes.shape) != 2:
            raise misfit(
                self.codes,
                codes.shape,
                f"is no matrix of FP8 or INT8, though it has `{self.scale}`",
            )
        grid = tuple(-(-size // block) for size, block in zip(codes.shape, self.block, strict=True))
        names = [self.scale] if self.zero_point is None else [self.scale, self.zero_point]
        for name in names:
            shape = require(stored, name).shape
            if shape != grid and not (grid == (1, 1) and shape in ((), (1,))):
                raise misfit(name, shape, f"is not {list(grid)}, one for a block of codes")
        if scale.dtype not in _SCALES:
            raise misfit(self.scale, scale.shape, f"holds {scale.dtype}, which is no float")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        codes = stored.read_rows(self.codes, start, stop)
        values = codes.to(torch.float32)  # [r, I]
        if self.zero_point is not None:
            values -= self._spread(stored, self.zero_point, start, stop)
        return values.mul_(self._spread(stored, self.scale, start, stop)).to(self.dtype)

    def _spread(self, stored: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        """fp32 of a number a block, [r, I], or what broadcasts to it."""
        rows, columns = self.block
        if len(stored.info(name).shape) < 2:
            return stored.read(name).float().view(1, 1)
        first, last = start // rows, -(-stop // rows)
        grid = stored.read_rows(name, first, last).float()
        if rows > 1:
            grid = grid.repeat_interleave(rows, 0)[start - first * rows : stop - first * rows]
        if columns >= self.shape[1]:
            return grid
        return grid.repeat_interleave(columns, 1)[:, : self.shape[1]]
