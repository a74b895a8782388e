"""Knows how checkpoints hold weights that bitsandbytes has quantized; gives them as float tensors.

4 bits (NF4, FP4): `P.weight` packed, two values a byte, `P.weight.absmax` a scale for each block,
`P.weight.quant_state.bitsandbytes__nf4` JSON in bytes; with double quantization `absmax` is uint8
and `P.weight.nested_*` are the scales of scales. 8 bits: `P.weight` int8 and `P.SCB`, the largest
magnitude of each row. What bitsandbytes has left alone lies beside them as it was.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.bnb import BlockSpan, NestedScales, dequantize_span, load
from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.sources.packed import (
    DAMAGED_HINT,
    Format,
    PackedTensor,
    misfit,
    modules,
    present,
    require,
)

_STATE = ".quant_state.bitsandbytes__"
_SCB, _LAYOUT = "SCB", "weight_format"
_TYPES = ("nf4", "fp4")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[PackedTensor]:
    states = [name for name in stored.tensors if _STATE in name]
    eight_bit = list(modules(stored, _SCB))
    layouts = [name for module in eight_bit for name in present(stored, module, _LAYOUT)]
    if states or eight_bit:
        load()
    small = stored.read_small([*states, *layouts])
    for name in states:
        yield _four_bit(stored, name, small[name])
    for module in eight_bit:
        yield _eight_bit(stored, module, small.get(f"{module}.{_LAYOUT}"))


@dataclass(frozen=True)
class FourBitTensor(PackedTensor):
    """Blocks run through the flattened tensor, whatever its rows are."""

    quant_type: str
    block_size: int
    nested_block_size: int = 0  # 0: scales are not quantized
    nested_offset: float = 0.0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def check(self, stored: Checkpoint) -> None:
        blocks = -(-self.count // self.block_size)
        weight = require(stored, self.name)
        if len(weight.shape) != 2 or weight.shape[1] != 1 or 2 * weight.nbytes < self.count:
            raise misfit(self.name, weight.shape, f"does not hold {self.count} values of 4 bits")
        expected = {"absmax": (torch.float32, blocks)}
        if self.nested_block_size:
            nested_blocks = -(-blocks // self.nested_block_size)
            expected = {
                "absmax": (torch.uint8, blocks),
                "nested_absmax": (torch.float32, nested_blocks),
                "nested_quant_map": (torch.float32, 256),
            }
        for part in self.parts:
            require(stored, part)
        for part, (dtype, count) in expected.items():
            info = require(stored, f"{self.name}.{part}")
            if info.dtype != dtype or math.prod(info.shape) != count or len(info.shape) != 1:
                raise misfit(f"{self.name}.{part}", info.shape, f"is not {count} of {dtype}")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        columns = math.prod(self.shape[1:])
        span = BlockSpan.around(start * columns, stop * columns, self.block_size)
        itemsize = stored.info(self.name).dtype.itemsize  # blocks begin at multiples of it
        first, last = span.packed.start, span.packed.stop
        packed = stored.read_rows(self.name, first // itemsize, -(-last // itemsize))
        values = dequantize_span(
            packed.flatten().view(torch.uint8)[: last - first],
            self._scales(stored, span.blocks),
            self.block_size,
            self.quant_type,
            self.dtype,
        )
        return values[span.inner].view(stop - start, *self.shape[1:])

    def _scales(self, stored: Checkpoint, blocks: slice) -> Tensor:
        """fp32, of these blocks."""
        absmax, size = f"{self.name}.absmax", self.nested_block_size
        if not size:
            return stored.read_rows(absmax, blocks.start, blocks.stop)
        first, last = blocks.start // size, -(-blocks.stop // size)
        nested = NestedScales(
            stored.read_rows(f"{self.name}.nested_absmax", first, last),
            stored.read(f"{self.name}.nested_quant_map"),
            torch.tensor(self.nested_offset),
            size,
        )
        return nested.expand(stored.read_rows(absmax, first * size, blocks.stop))[
            blocks.start - first * size :
        ]


@dataclass(frozen=True)
class EightBitTensor(PackedTensor):
    """value = code * SCB / 127, in the fp32 that bitsandbytes gives back."""

    def check(self, stored: Checkpoint) -> None:
        weight, scale = stored.info(self.name), stored.info(self.parts[1])
        if weight.dtype != torch.int8 or len(weight.shape) != 2:
            raise misfit(self.name, weight.shape, "is no int8 matrix, though it has an `SCB`")
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise misfit(self.parts[1], scale.shape, f"is no scale a row of `{self.name}`")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        values: Tensor = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(
            stored.read_rows(self.name, start, stop),
            stored.read_rows(self.parts[1], start, stop),
        )
        return values


def _eight_bit(stored: Checkpoint, module: str, layout: Tensor | None) -> EightBitTensor:
    name = f"{module}.weight"
    if layout is not None and int(layout) != 0:
        raise QuantError(
            f"`{name}` lies in the order of an old GPU kernel",
            "save the model anew with bitsandbytes 0.45 or later, or use the 16-bit one",
        )
    parts = (name, f"{module}.{_SCB}", *present(stored, module, _LAYOUT))
    return EightBitTensor(name, torch.float32, require(stored, name).shape, parts)


def _four_bit(stored: Checkpoint, state_name: str, content: Tensor) -> FourBitTensor:
    """Read what the JSON beside a packed tensor says; raises QuantError where it makes no sense."""
    name = state_name.partition(_STATE)[0]
    require(stored, name)
    try:
        state = json.loads(bytes(content.tolist()))
        shape, nested = tuple(map(_count, state["shape"])), "nested_offset" in state
        tensor = FourBitTensor(
            name=name,
            dtype=_DTYPES[state["dtype"]],
            shape=shape,
            parts=(name, *_companions(state_name, name, nested)),
            quant_type=state["quant_type"],
            block_size=state["blocksize"],
            nested_block_size=_count(state["nested_blocksize"]) if nested else 0,
            nested_offset=float(state["nested_offset"]) if nested else 0.0,
        )
        if tensor.quant_type not in _TYPES or tensor.block_size not in _BLOCK_SIZES or not shape:
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise QuantError(
            f"`{state_name}` is no description of a packed tensor", DAMAGED_HINT
        ) from error
    return tensor


def _companions(state_name: str, name: str, nested: bool) -> list[str]:
    parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    return [state_name, *(f"{name}.{part}" for part in parts)]


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _form(said: Mapping[str, Any]) -> str:
    """Old configs say only `load_in_8bit`, newer ones `_load_in_8bit`."""
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return "bitsandbytes LLM.int8"
    doubly = ", double quantization" if said.get("bnb_4bit_use_double_quant") else ""
    return f"bitsandbytes {str(said.get('bnb_4bit_quant_type', 'fp4')).upper()}{doubly}"


FORMAT = Format("bitsandbytes", "bitsandbytes (NF4, FP4, LLM.int8)", _packed_tensors, _form)
