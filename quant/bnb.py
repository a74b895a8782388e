"""Knows bitsandbytes' two schemes for dense linears at run time, NF4 and LLM.int8; knows no files.

Legend: T tokens, O out, I in features; B blocks of 64 weights, which run on over rows; K outliers.

Weights are quantized and multiplied by bitsandbytes' own functions, in memory that does not grow
with the weight. It is imported when the first weight is made.
"""

import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.errors import QuantError
from quant.quantize import dequantize
from quant.tensor import QuantizedWeight

BnbScheme = Literal["nf4", "llm-int8"]
SCHEMES: tuple[BnbScheme, ...] = ("nf4", "llm-int8")
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
OUTLIER_THRESHOLD = 6.0  # of LLM.int8's paper: activations beyond it are multiplied in 16 bits
# The paper finds at most seven outlier columns in models up to 13B.
MAX_OUTLIERS = 32
# Up to so many tokens are a decode step, which may be captured: nothing may depend on data.
_STEP_TOKENS = 8
_TILE_VALUES = 1 << 22
# With larger blocks its AVX-512 code is inexact, so it takes a detour through a compiler.
_MAX_BLOCK_SIZE = 1024


def parse_scheme(name: str) -> BnbScheme:
    """Raises QuantError for any other name."""
    for scheme in SCHEMES:
        if name == scheme:
            return scheme
    raise QuantError(f"unknown scheme `{name}` of bitsandbytes", f"use one of {', '.join(SCHEMES)}")


class BnbWeight(ABC):
    """The weight of one Linear, [O, I], in a scheme of bitsandbytes, on one device."""

    shape: tuple[int, int]

    @staticmethod
    def of(
        weight: QuantizedWeight | Tensor, scheme: str, device: torch.device | str
    ) -> "BnbWeight":
        """Quantize `weight`, wherever it lies, on `device`; some rows at a time.

        To be called on the device's default stream, which bitsandbytes' quantizers always take.
        Raises QuantError for an unknown scheme, and where bitsandbytes cannot use the device.
        """
        if parse_scheme(scheme) == "nf4":
            return Nf4Weight.make(weight, torch.device(device))
        return LlmInt8Weight.make(weight, torch.device(device))

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """x [..., I] of any float dtype -> [..., O] in x's dtype."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """fp32 [O, I]."""


@dataclass(frozen=True)
class NestedScales:
    """How the scales of blocks are quantized in turn (double quantization)."""

    absmax: Tensor  # fp32 [B / 256]
    code: Tensor  # fp32 [256]
    offset: Tensor  # fp32 []
    block_size: int = NESTED_BLOCK_SIZE

    @property
    def nbytes(self) -> int:
        return self.absmax.nbytes + self.code.nbytes + self.offset.nbytes

    def expand(self, absmax: Tensor) -> Tensor:
        """uint8 [B] -> fp32 [B]"""
        assert self.absmax.numel() * self.block_size >= absmax.numel(), "scales of scales are short"
        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, self.absmax, self.code, self.block_size, torch.float32
        )
        return scales + self.offset


@dataclass(frozen=True)
class Nf4Weight(BnbWeight):
    packed: Tensor  # uint8 [O * I / 2, 1]
    absmax: Tensor  # fp32 [B], or uint8 [B] when nested
    shape: tuple[int, int]
    nested: NestedScales | None

    @classmethod
    def make(
        cls, weight: QuantizedWeight | Tensor, device: torch.device, double: bool = True
    ) -> "Nf4Weight":
        """`double`: the scales are quantized too, 4.13 instead of 4.5 bits a weight."""
        functional = load(device)
        rows, columns = _shape(weight)
        count = rows * columns
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
        absmax = torch.empty(-(-count // BLOCK_SIZE), device=device)
        done = 0
        for block in _row_blocks(weight, device, BLOCK_SIZE):
            codes, state = functional.quantize_4bit(
                block.float().flatten(), blocksize=BLOCK_SIZE, quant_type="nf4"
            )
            packed[done // 2 :][: len(codes)] = codes
            absmax[done // BLOCK_SIZE :][: len(state.absmax)] = state.absmax
            done += block.numel()
        if not double:
            return cls(packed, absmax, (rows, columns), None)
        offset = absmax.mean()
        codes, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = NestedScales(state.absmax, state.code, offset)
        return cls(packed, codes, (rows, columns), nested)

    @property
    def nbytes(self) -> int:
        nested = self.nested.nbytes if self.nested else 0
        return self.packed.nbytes + self.absmax.nbytes + nested

    def linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # [T, I]
        out = self._tiled(rows) if x.device.type == "cpu" else self._fused(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        return self._rows(self._scales(), 0, self.out_features, torch.float32)

    def _fused(self, x: Tensor) -> Tensor:
        nested = self.nested
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            self.packed,
            self.shape,
            nested.absmax if nested else self.absmax,
            BLOCK_SIZE,
            "nf4",
            absmax_8bit=self.absmax if nested else None,
            absmax_code=nested.code if nested else None,
            absmax_offset=nested.offset if nested else None,
        )
        return out

    def _tiled(self, x: Tensor) -> Tensor:
        """The CPU's way: its fused kernel wants another layout, its unfused one the whole weight
        in x's dtype, wrongly where blocks cross rows.
        """
        scales, out = self._scales(), x.new_empty(x.shape[0], self.out_features)
        step = _tile_rows(self.shape, 1)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            out[:, start:stop] = F.linear(x, self._rows(scales, start, stop, x.dtype))
        return out

    def _scales(self) -> Tensor:
        return self.nested.expand(self.absmax) if self.nested else self.absmax

    def _rows(self, scales: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) as [stop - start, I]."""
        span = BlockSpan.around(start * self.in_features, stop * self.in_features, BLOCK_SIZE)
        values = dequantize_span(
            self.packed.view(-1)[span.packed], scales[span.blocks], BLOCK_SIZE, "nf4", dtype
        )
        return values[span.inner].view(stop - start, self.in_features)


@dataclass(frozen=True)
class LlmInt8Weight(BnbWeight):
    codes: Tensor  # int8 [O, I]
    absmax: Tensor  # fp32 [O]: value = code * absmax / 127

    @classmethod
    def make(cls, weight: QuantizedWeight | Tensor, device: torch.device) -> "LlmInt8Weight":
        functional = load(device)
        rows, columns = _shape(weight)
        codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
        absmax = torch.empty(rows, device=device)
        done = 0
        for block in _row_blocks(weight, device, 1):
            part = slice(done, done + len(block))
            codes[part], absmax[part], _ = functional.int8_vectorwise_quant(block.half())
            done += len(block)
        return cls(codes, absmax)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def linear(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # [T, I]
        out = self._step(rows) if rows.shape[0] <= _STEP_TOKENS else self._mixed(rows)
        return out.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        values: Tensor = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(
            self.codes, self.absmax
        )
        return values

    def _mixed(self, x: Tensor) -> Tensor:
        """As bitsandbytes has it: the host waits to learn how many outlier columns there are."""
        ops = torch.ops.bitsandbytes
        codes, absmax, outliers = ops.int8_vectorwise_quant.default(x.half(), OUTLIER_THRESHOLD)
        out, _ = ops.int8_mixed_scaled_mm.default(
            x, codes, self.codes, absmax, self.absmax, outliers
        )
        return cast(Tensor, out)

    def _step(self, x: Tensor) -> Tensor:
        """The same without waiting: the MAX_OUTLIERS largest columns stand for all outliers.

        Those among them that are none count as zeros; outliers beyond them are quantized.
        """
        ops = torch.ops.bitsandbytes
        magnitude = x.half().abs()  # [T, I]
        largest, columns = magnitude.amax(dim=0).topk(min(MAX_OUTLIERS, self.in_features))  # [K]
        is_outlier = largest >= OUTLIER_THRESHOLD  # [K]
        apart = torch.zeros_like(magnitude[0], dtype=torch.bool)  # [I]
        apart = apart.scatter(0, columns, is_outlier)
        # Only what is large itself is left out of its row's scale, but whole columns are apart.
        usual = x.half().masked_fill(apart & (magnitude >= OUTLIER_THRESHOLD), 0)
        codes, absmax, _ = ops.int8_vectorwise_quant.default(usual)
        out = ops.int8_scaled_mm.default(
            codes.masked_fill(apart, 0), self.codes, absmax, self.absmax, dtype=x.dtype
        )
        outliers = torch.where(is_outlier, x[:, columns], 0)  # [T, K]
        weights = ops.int8_vectorwise_dequant.default(self.codes[:, columns], self.absmax)  # [O, K]
        return cast(Tensor, out.addmm(outliers, weights.to(x.dtype).t()))


def bnb_nbytes(scheme: BnbScheme, out_features: int, in_features: int) -> int:
    """Bytes that `BnbWeight.of` will keep."""
    count = out_features * in_features
    if scheme == "llm-int8":
        return count + 4 * out_features
    blocks = -(-count // BLOCK_SIZE)
    nested = 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 * 256 + 4
    return (count + 1) // 2 + blocks + nested


@dataclass(frozen=True)
class BlockSpan:
    """Whole blocks around a run of values: slices of blocks, of packed bytes, and of the result."""

    blocks: slice
    packed: slice
    inner: slice

    @classmethod
    def around(cls, start: int, stop: int, block_size: int) -> "BlockSpan":
        first, last = start // block_size, -(-stop // block_size)
        begin = first * block_size
        return cls(
            slice(first, last),
            slice(begin // 2, min(last * block_size, stop + stop % 2) // 2),
            slice(start - begin, stop - begin),
        )


def dequantize_span(
    packed: Tensor, absmax: Tensor, block_size: int, quant_type: str, dtype: torch.dtype
) -> Tensor:
    """uint8 [n / 2] and fp32 [n / block_size], the last block perhaps short -> [n].

    Values go through as one row: where rows are no multiple of blocks, bitsandbytes 0.50 gives
    wrong ones on CPUs with AVX-512.
    """
    # Its kernels would read on behind the end.
    assert absmax.numel() * block_size >= 2 * packed.numel(), "scales of blocks are short"
    repeats = max(1, block_size // _MAX_BLOCK_SIZE)
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed,
        absmax if repeats == 1 else absmax.repeat_interleave(repeats),
        block_size // repeats,
        quant_type,
        (2 * packed.numel(),),
        dtype,
    )
    return values.view(-1)


def load(device: torch.device | None = None) -> Any:
    """bitsandbytes.functional; raises QuantError where it cannot compute on `device`."""
    functional, library = _import()
    if device is not None and device.type != "cpu" and not library.compiled_with_cuda:
        raise QuantError(
            f"bitsandbytes cannot compute on `{device}`: it finds no library for this CUDA",
            "keep dense layers as they are stored: `--dense-scheme stored`",
        )
    return functional


@cache
def _import() -> tuple[Any, Any]:
    # On some CPUs it would download a kernel that nothing here calls, and warn when it cannot.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    held = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes.functional
        from bitsandbytes.cextension import lib
    finally:
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held
    return bitsandbytes.functional, lib


def _shape(weight: QuantizedWeight | Tensor) -> tuple[int, int]:
    if isinstance(weight, QuantizedWeight):
        return weight.out_features, weight.in_features
    assert weight.dim() == 2, f"a weight has not {weight.dim()} dimensions"
    return weight.shape[0], weight.shape[1]


def _tile_rows(shape: tuple[int, int], block_size: int) -> int:
    """About _TILE_VALUES values, and whole blocks."""
    aligned = block_size // math.gcd(block_size, shape[1])
    return max(1, _TILE_VALUES // (shape[1] * aligned)) * aligned


def _row_blocks(
    weight: QuantizedWeight | Tensor, device: torch.device, block_size: int
) -> Iterator[Tensor]:
    """All rows as floats on `device`, so many at a time that blocks do not cross borders."""
    shape = _shape(weight)
    step = _tile_rows(shape, block_size)
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        if isinstance(weight, QuantizedWeight):
            packed, scale = weight.packed[rows].to(device), weight.scale[rows].to(device)
            yield dequantize(QuantizedWeight(packed, scale, weight.scheme))
        else:
            yield weight[rows].to(device)
