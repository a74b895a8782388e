"""Knows how to choose integers and scales for a weight from the weight alone; knows no files.

Legend: O out, I in features; g group size; G = I / g groups a row; r rows of a tile.

A tile is worked on as [g, r, G], so that every operation is elementwise over long runs and a sum
over a group is a fixed tree of additions: the result of a group depends on nothing but the group,
neither on the tile nor on the machine.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.pack import unpack
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

Method = Literal["searched", "nearest"]

# Groups worked on at once: three fp32 buffers of a tile stay in a 2 MiB cache.
_TILE_VALUES = 1 << 17
# Beyond the one, products of codes and bf16 scales may overflow; below the other, scales lose
# their digits: such a group is zero for every purpose and is stored as zeros.
_MAX_MAGNITUDE = 2.0**126
_MIN_MAGNITUDE = 2.0**-110
# Where the best quotient `extreme / scale` of a group lies, found by exhaustive search over
# Gaussian, Laplace and Student-t groups; the extreme takes the code -8, or a clipped one.
_INT4_QUOTIENTS = {32: (6.6, 9.0), 64: (6.6, 9.5), 128: (6.6, 10.0)}
_INT4_CANDIDATES = 8
# Around extreme / -128 what counts is the luck of the bf16 grid: its neighbours are tried.
_INT8_STEPS = range(-2, 6)


def quantize(weight: Tensor, scheme: QuantScheme, method: Method = "searched") -> QuantizedWeight:
    """Quantize a weight [O, I] of any float dtype and any strides.

    "searched" tries scales around the extreme of each group for the smallest squared error and
    refines the best in closed form; "nearest" is plain rounding, absmax / (2^(bits-1) - 1), and
    no group of "searched" has a larger error than it. Raises QuantError for values that are not
    finite or too large for a bf16 scale.
    """
    assert weight.dim() == 2, f"a weight has not {weight.dim()} dimensions"
    assert weight.is_floating_point(), f"a weight is not {weight.dtype}"
    assert method in ("searched", "nearest"), f"unknown method {method}"
    out_features, in_features = weight.shape
    scheme.check_shape("weight", out_features, in_features)
    packed = torch.empty(scheme.packed_shape(out_features, in_features), dtype=torch.int32)
    scale = torch.empty(scheme.scale_shape(out_features, in_features), dtype=torch.bfloat16)
    rows = max(1, min(out_features, _TILE_VALUES // in_features))
    tile = _Tile(scheme, rows, in_features // scheme.group_size)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        tile.load(weight[start:stop])
        if method == "searched":
            tile.search()
        else:
            tile.nearest()
        tile.store(packed[start:stop], scale[start:stop])
    return QuantizedWeight(packed, scale, scheme)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [O, I] in `dtype`: the product of code and scale, rounded once."""
    q = unpack(weight.packed, weight.scheme.bits, weight.in_features)  # [O, I]
    grouped = q.view(*weight.scale.shape, weight.scheme.group_size).float()  # [O, G, g]
    grouped *= weight.scale.float().unsqueeze(-1)
    return grouped.view(weight.out_features, weight.in_features).to(dtype)


class _Tile:
    """Some rows of a weight while their scales are chosen; buffers are kept between tiles."""

    def __init__(self, scheme: QuantScheme, rows: int, groups: int) -> None:
        self.scheme = scheme
        self.low, self.high = -scheme.zero_point, scheme.zero_point - 1
        self.buffers = [torch.empty(scheme.group_size, rows, groups) for _ in range(3)]

    def load(self, weight: Tensor) -> None:
        """Take the next rows, [r, I]."""
        group_size = self.scheme.group_size
        self.x, self.t, self.q = (b[:, : weight.shape[0]] for b in self.buffers)  # [g, r, G]
        self.x.copy_(weight.unflatten(1, (-1, group_size)).permute(2, 0, 1))
        top, bottom = self.x.amax(0), self.x.amin(0)  # [r, G]
        extreme = torch.where(top >= -bottom, top, bottom)  # largest magnitude, with its sign
        magnitude = extreme.abs()
        # NaN and infinity of any value show in the extreme of its group.
        if not bool(magnitude.max() < _MAX_MAGNITUDE):
            raise QuantError(
                "weights hold NaN, infinite or absurdly large values",
                "the checkpoint is damaged or its training diverged; download it again",
            )
        self.extreme = torch.where(magnitude < _MIN_MAGNITUDE, 1.0, extreme)

    def nearest(self) -> None:
        """Leave plain rounding: positive scales that take the extreme to the largest code."""
        self.scale = _round_to_bf16(self.extreme.abs() / self.high)

    def search(self) -> None:
        """Leave the best scale found for each group."""
        candidates = self._candidates()
        self.scale = next(candidates)
        self.error = self._error_of(self.scale)
        for scale in candidates:
            self._keep_better(scale)
        if self.scheme.bits == 4:
            self._keep_better(self._refined())

    def store(self, packed: Tensor, scale: Tensor) -> None:
        """Write int32 words [r, I * bits / 32] and bf16 scales [r, G]."""
        code = self._round_to_codes(self.scale)  # [g, r, G], whole numbers
        if self.scheme.bits == 4:
            code = code[0::2].add_(code[1::2], alpha=16).add_(8 + 8 * 16)
        else:
            code = code.add_(128)
        rows, groups = scale.shape
        packed.view(torch.uint8).view(rows, groups, -1).copy_(code.to(torch.uint8).permute(1, 2, 0))
        scale.copy_(self.scale)

    def _candidates(self) -> Iterator[Tensor]:
        """Scales [r, G] to try; the first is plain rounding, so nothing worse is ever kept."""
        yield _round_to_bf16(self.extreme / self.high)
        if self.scheme.bits == 4:
            first, last = _INT4_QUOTIENTS[self.scheme.group_size]
            for quotient in torch.linspace(first, last, _INT4_CANDIDATES).tolist():
                yield _round_to_bf16(self.extreme / -quotient)
        else:
            middle = (self.extreme / self.low).bfloat16().view(torch.int16)
            for step in _INT8_STEPS:
                yield (middle + step).view(torch.bfloat16).float()

    def _keep_better(self, scale: Tensor) -> None:
        error = self._error_of(scale)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.error = torch.where(better, error, self.error)

    def _error_of(self, scale: Tensor) -> Tensor:
        """Squared error of each group, [r, G], in units of its squared extreme."""
        self._round_to_codes(scale)
        self.t.sub_(self.q)
        relative = scale / self.extreme
        return self._group_sum(self.t.mul_(self.t)) * (relative * relative)

    def _refined(self) -> Tensor:
        """The scale of least squared error for the codes of the best scale so far."""
        code = self._round_to_codes(self.scale)
        dot = self._group_sum(self.t.mul_(code)).clone()
        square = self._group_sum(torch.mul(code, code, out=self.t))
        # Codes that are all zero (a group stored as zeros) leave the scale as it is.
        return torch.where(square > 0, _round_to_bf16(self.scale * (dot / square)), self.scale)

    def _round_to_codes(self, scale: Tensor) -> Tensor:
        """x / scale in self.t, and rounded to codes in self.q, which is returned."""
        torch.mul(self.x, scale.reciprocal(), out=self.t)
        return torch.round(self.t, out=self.q).clamp_(self.low, self.high)

    def _group_sum(self, values: Tensor) -> Tensor:
        """Sum of [g, r, G] over g, in a fixed order, in place: a view [r, G] of `values`."""
        half = self.scheme.group_size // 2
        while half:
            values[:half].add_(values[half : 2 * half])
            half //= 2
        return values[0]


def _round_to_bf16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()
