"""Knows how to choose integers and scales for a weight from the weight alone; knows no files.

Legend: O out, I in features; g group size; G = I / g groups a row; r rows of a tile.

A tile is worked on as [g, r, G], so that every operation is elementwise over long runs and a sum
over a group is a fixed tree of additions: the result of a group depends on nothing but the group,
neither on the tile nor on the machine. Where kernels are compiled (quant/kernels/cpu), they do the
search: the same operations in the same order, so the same result to the last bit.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.kernels.cpu.library import Library, NoLibrary, library
from quant.kernels.cpu.scales import search_scales
from quant.pack import unpack
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

Method = Literal["searched", "nearest"]

# Changes whenever the same weights become other integers or scales: then what an interrupted
# conversion has left cannot be taken up.
REVISION = 2

# Weights worked on at once, in six buffers of 512 KiB: with less, the many small operations
# on scales cost more than the cache saves; with twice as much, it is 2x slower.
_TILE_VALUES = 1 << 17
# Beyond the one, products of codes and bf16 scales may overflow; below the other, scales lose
# their digits: such a group is zero for every purpose and is stored as zeros.
_MAX_MAGNITUDE = 2.0**126
_MIN_MAGNITUDE = 2.0**-110
# The largest magnitude of a group as an integer: what is tried is tried with 16 bits a weight.
_EXTREME = 32767
# One code in integers that are not rounded yet: 16 bits hold 15 codes, or 256.
_INT4_UNIT, _INT8_UNIT = 2048, 128
# Where the best quotient `-extreme / scale` of a group lies, found by exhaustive search over
# Gaussian, Laplace and Student-t groups; the extreme takes the code -8, or a clipped one.
_INT4_QUOTIENTS = {32: (7.3, 9.0), 64: (7.3, 9.5), 128: (7.3, 10.0)}
_INT4_CANDIDATES = 7
# Around extreme / -128 what counts is the luck of the bf16 grid: its neighbours are tried.
_INT8_STEPS = range(-2, 6)


@dataclass(frozen=True)
class SquaredError:
    """Sums over weights: of squared differences, and of squares. Adds up over tensors."""

    error: float = 0.0
    total: float = 0.0

    def __add__(self, other: "SquaredError") -> "SquaredError":
        return SquaredError(self.error + other.error, self.total + other.total)

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error, relative to that of the weights."""
        return math.sqrt(self.error / self.total) if self.total else 0.0


def quantize(weight: Tensor, scheme: QuantScheme, method: Method = "searched") -> QuantizedWeight:
    """Quantize a weight [O, I] of any float dtype and any strides.

    "searched" tries scales around the extreme of each group for the smallest squared error and
    refines the best in closed form; "nearest" is plain rounding, absmax / (2^(bits-1) - 1), and
    no group of "searched" has a larger error than it. Raises QuantError for values that are not
    finite or too large for a bf16 scale.
    """
    return _quantize(weight, scheme, method)[0]


def quantize_measured(weight: Tensor, scheme: QuantScheme) -> tuple[QuantizedWeight, SquaredError]:
    """As `quantize`, and the error made; the same to the last bit however tiles are cut."""
    quantized, errors, totals = _quantize(weight, scheme, "searched", measure=True)
    return quantized, SquaredError(math.fsum(errors), math.fsum(totals))


def _quantize(
    weight: Tensor, scheme: QuantScheme, method: Method, measure: bool = False
) -> tuple[QuantizedWeight, list[float], list[float]]:
    """The weight, and the squared errors and squares of each row if they are to be measured."""
    assert weight.dim() == 2, f"a weight has not {weight.dim()} dimensions"
    assert weight.is_floating_point(), f"a weight is not {weight.dtype}"
    assert method in ("searched", "nearest"), f"unknown method {method}"
    out_features, in_features = weight.shape
    scheme.check_shape("weight", out_features, in_features)
    compiled = _compiled() if method == "searched" else None
    if compiled is not None:
        return _searched(weight, scheme, compiled, measure)
    packed = torch.empty(scheme.packed_shape(out_features, in_features), dtype=torch.int32)
    scale = torch.empty(scheme.scale_shape(out_features, in_features), dtype=torch.bfloat16)
    rows = max(1, min(out_features, _TILE_VALUES // in_features))
    tile = _Tile(scheme, rows, in_features // scheme.group_size)
    errors: list[float] = []
    totals: list[float] = []
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        tile.load(weight[start:stop])
        if method == "searched":
            tile.search()
        else:
            tile.nearest()
        if measure:
            errors += tile.row_errors()
            totals += tile.row_squares()
        tile.store(packed[start:stop], scale[start:stop])
    return QuantizedWeight(packed, scale, scheme), errors, totals


@functools.cache
def _compiled() -> Library | None:
    """The kernels that search as the tiles do, but faster: None where there are none, or only
    those for any processor, which torch's own vectors surpass.
    """
    try:
        found = library()
    except NoLibrary:
        return None
    return None if found.isa == "portable" else found


def _searched(
    weight: Tensor, scheme: QuantScheme, compiled: Library, measure: bool
) -> tuple[QuantizedWeight, list[float], list[float]]:
    found = search_scales(compiled, weight, scheme, _factors(scheme), _steps(scheme))
    if found is None:
        raise _not_finite()
    quantized = QuantizedWeight(found.packed, found.scale, scheme)
    if not measure:
        return quantized, [], []
    return quantized, found.row_errors.tolist(), found.row_squares.tolist()


def _factors(scheme: QuantScheme) -> list[int]:
    """Quotients to try beside that of plain rounding, in parts of _INT4_UNIT."""
    if scheme.bits == 8:
        return []
    first, last = _INT4_QUOTIENTS[scheme.group_size]
    step = (last - first) / (_INT4_CANDIDATES - 1)
    return [round((first + step * i) * _INT4_UNIT) for i in range(_INT4_CANDIDATES)]


def _steps(scheme: QuantScheme) -> range:
    """Neighbours in bf16 of extreme / lowest code to try."""
    return _INT8_STEPS if scheme.bits == 8 else range(0)


def _row_sums(squares: Tensor, unit: Tensor) -> list[float]:
    """Sums [r] of squares [r, G] that are given in units, one group after the other."""
    sums = (squares.double() * unit.double().square_()).cumsum(1)
    return sums[:, -1].tolist() if sums.shape[1] else [0.0] * len(sums)


def _not_finite() -> QuantError:
    return QuantError(
        "weights hold NaN, infinite or absurdly large values",
        "the checkpoint is damaged or its training diverged; download it again",
    )


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
        shape = scheme.group_size, rows, groups
        self.buffers = [torch.empty(shape) for _ in range(3)]
        self.integers = [torch.empty(shape, dtype=torch.int32) for _ in range(3)]

    def load(self, weight: Tensor) -> None:
        """Take the next rows, [r, I]."""
        self.x, self.t, self.q = (b[:, : weight.shape[0]] for b in self.buffers)  # [g, r, G]
        self.x.copy_(weight.unflatten(1, (-1, self.scheme.group_size)).permute(2, 0, 1))
        top, bottom = self.x.amax(0), self.x.amin(0)  # [r, G]
        extreme = torch.where(top >= -bottom, top, bottom)  # largest magnitude, with its sign
        magnitude = extreme.abs()
        # NaN and infinity of any value show in the extreme of its group.
        if not bool(magnitude.max() < _MAX_MAGNITUDE):
            raise _not_finite()
        self.extreme = torch.where(magnitude < _MIN_MAGNITUDE, 1.0, extreme)

    def nearest(self) -> None:
        """Leave plain rounding: positive scales that take the extreme to the largest code."""
        self.scale = _round_to_bf16(self.extreme.abs() / self.high)

    def search(self) -> None:
        """Leave the best scale found for each group."""
        rows = self.x.shape[1]
        self.n, *self.work = (b[:, :rows] for b in self.integers)  # [g, r, G]
        by = torch.div(torch.tensor(-float(_EXTREME)), self.extreme)
        self.n.copy_(torch.mul(self.x, by, out=self.t).round_())  # the extreme is -_EXTREME
        torch.mul(self.x, by, out=self.t)
        self.squares = self._group_sum(self.t.mul_(self.t)).clone()
        if self.scheme.bits == 4:
            self._search_4()
        else:
            self._search_8()

    def _search_4(self) -> None:
        """Codes of quotients, each with the scale that fits them best: dot / square, which leaves
        squares - dot^2 / square. The first is plain rounding, whose scale has its own error.
        """
        plain = _round_to_bf16(self.extreme / -7.0)
        dot, square = self._fit(self._factors_of(plain, _INT4_UNIT))
        unit = self.extreme * (-1 / _EXTREME)
        width = plain / unit
        plain_error = (self.squares - (width + width) * dot) + (width * width) * square
        gain = dot * dot
        for factor in _factors(self.scheme):
            other, other_square = self._fit(factor)
            other_gain = other * other
            better = gain * other_square < other_gain * square
            gain = torch.where(better, other_gain, gain)
            dot = torch.where(better, other, dot)
            square = torch.where(better, other_square, square)
        # A group of zeros has the scale 1.
        self.scale = _round_to_bf16(torch.where(square > 0, (dot / square) * unit, 1.0))
        limit = (self.squares - gain / square) * 1.0078125 + self.squares * 2.0**-16
        self._compare(plain, plain_error, limit)

    def _search_8(self) -> None:
        """Scales as bf16 has them around extreme / -128: what counts is the luck of the grid."""
        self.scale = plain = _round_to_bf16(self.extreme / 127.0)
        least = plain_error = self._residue(plain)
        middle = (self.extreme / -128.0).bfloat16().view(torch.int16)
        for step in _steps(self.scheme):
            other = (middle + step).view(torch.bfloat16).float()
            error = self._residue(other)
            self.scale = torch.where(error < least, other, self.scale)
            least = torch.minimum(error, least)
        noise = self._weight_of(plain) * (2.0 * self.scheme.group_size)
        self._compare(plain, plain_error, least * 1.0625 + noise)

    def _compare(self, plain: Tensor, plain_error: Tensor, limit: Tensor) -> None:
        """Integers are right to some part of an error: where plain rounding may be better, floats
        decide.
        """
        theirs = self._squares_left(plain) * self._weight_of(plain)
        ours = self._squares_left(self.scale) * self._weight_of(self.scale)
        better = (plain_error < limit) & (theirs < ours)
        self.scale = torch.where(better, plain, self.scale)

    def _fit(self, factor: Tensor | int) -> tuple[Tensor, Tensor]:
        """Of codes found with this factor: the sum of products with weights, and of squares."""
        # Rounded twice, in one step: to parts of a code, then to a code.
        code = torch.mul(self.n, factor, out=self.work[0]).add_((1 << 14) + (1 << 25))
        code = code.bitwise_right_shift_(15 + 11).clamp_(-8, 7)
        dot = _exact_sum(torch.mul(self.n, code, out=self.work[1]))
        return dot, _exact_sum(code.mul_(code))

    def _residue(self, scale: Tensor) -> Tensor:
        """As squares left times _weight_of, from integers: in parts of _INT8_UNIT^2."""
        t = torch.mul(self.n, self._factors_of(scale, _INT8_UNIT), out=self.work[0])
        t.add_(1 << 14).bitwise_right_shift_(15)
        low, high = self.low * _INT8_UNIT, self.high * _INT8_UNIT
        code = torch.clamp(t, low, high, out=self.work[1]).add_(_INT8_UNIT // 2)
        difference = t.sub_(code.bitwise_and_(-_INT8_UNIT))
        return _exact_sum(difference.mul_(difference)) * self._weight_of(scale)

    def _factors_of(self, scale: Tensor, unit: int) -> Tensor:
        return torch.round(self.extreme / scale * float(-unit)).int()

    def store(self, packed: Tensor, scale: Tensor) -> None:
        """Write int32 words [r, I * bits / 32] and bf16 scales [r, G]."""
        code = self._round_to_codes(self.scale.reciprocal())  # [g, r, G], whole numbers
        if self.scheme.bits == 4:
            code = code[0::2].add_(code[1::2], alpha=16).add_(8 + 8 * 16)
        else:
            code = code.add_(128)
        rows, groups = scale.shape
        packed.view(torch.uint8).view(rows, groups, -1).copy_(code.to(torch.uint8).permute(1, 2, 0))
        scale.copy_(self.scale)

    def row_errors(self) -> list[float]:
        """Squared error of each row."""
        return _row_sums(self._squares_left(self.scale), self.scale)

    def row_squares(self) -> list[float]:
        """Sum of squares of each row."""
        return _row_sums(self.squares, self.extreme.double() / _EXTREME)

    def _weight_of(self, scale: Tensor) -> Tensor:
        return (scale / self.extreme).square_()

    def _squares_left(self, scale: Tensor) -> Tensor:
        """Sum of squares of what rounding x / scale leaves, [r, G]: a view of self.t[0]."""
        code = self._round_to_codes(scale.reciprocal())
        # (t - code)^2 in one pass
        torch.ops.aten.mse_loss.out(self.t, code, 0, out=self.t)
        return self._group_sum(self.t)

    def _round_to_codes(self, inverse: Tensor) -> Tensor:
        """x / scale in self.t, and rounded to codes in self.q, which is returned."""
        torch.mul(self.x, inverse, out=self.t)
        return torch.round(self.t, out=self.q).clamp_(self.low, self.high)

    def _group_sum(self, values: Tensor) -> Tensor:
        """Sum of [g, r, G] over g, in a fixed order, in place: a view [r, G] of `values`."""
        half = self.scheme.group_size // 2
        while half:
            values[:half].add_(values[half : 2 * half])
            half //= 2
        return values[0]


def _exact_sum(values: Tensor) -> Tensor:
    """Sum of integers [g, r, G] over g, as floats: in any order, as none exceeds 32 bits."""
    return values.sum(0, dtype=torch.int32).float()


def _round_to_bf16(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()
