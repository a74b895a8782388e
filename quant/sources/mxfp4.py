"""Knows MXFP4 as gpt-oss is released: `N_blocks` uint8 [E, R, G, 16] with two e2m1 numbers a byte,
the lower half first, and `N_scales` uint8 [E, R, G], each the exponent of 32 of them.

They stand for `N` [E, 32 * G, R], transposed as transformers has it.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.sources.packed import Format, PackedTensor, misfit, require

_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP, _BIAS = 32, 127


@dataclass(frozen=True)
class Mxfp4Tensor(PackedTensor):
    """`parts`: blocks and scales."""

    def check(self, stored: Checkpoint) -> None:
        blocks, scales = (require(stored, part) for part in self.parts)
        if len(blocks.shape) != 4 or blocks.shape[3] * 2 != _GROUP or blocks.dtype != torch.uint8:
            raise misfit(self.parts[0], blocks.shape, "is not uint8 [experts, rows, groups, 16]")
        if scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
            raise misfit(self.parts[1], scales.shape, f"do not go with `{self.parts[0]}`")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        blocks, scales = (stored.read_rows(part, start, stop) for part in self.parts)
        values = _pairs()[blocks.int()].view(*scales.shape, _GROUP)  # [E, R, G, 32]
        values.mul_(torch.exp2(scales.float() - _BIAS).unsqueeze(-1))
        return values.to(self.dtype).flatten(2).transpose(1, 2).contiguous()


@functools.cache
def _pairs() -> Tensor:
    """The two numbers of each byte, fp32 [256, 2]."""
    numbers = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=1)


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[Mxfp4Tensor]:
    for part in stored.tensors:
        if not part.endswith(_BLOCKS):
            continue
        name = part.removesuffix(_BLOCKS)
        scales = require(stored, name + _SCALES).shape
        if len(scales) != 3:
            raise misfit(name + _SCALES, scales, "is not [experts, rows, groups]")
        shape = (scales[0], scales[2] * _GROUP, scales[1])
        yield Mxfp4Tensor(name, torch.bfloat16, shape, (part, name + _SCALES))


FORMAT = Format("mxfp4", "MXFP4 (gpt-oss)", _packed_tensors, lambda said: "MXFP4")
