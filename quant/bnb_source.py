"""Knows how checkpoints hold weights that bitsandbytes has quantized; gives them as float tensors.

4 bits (NF4, FP4): `P.weight` packed, two values a byte, `P.weight.absmax` a scale for each block,
`P.weight.quant_state.bitsandbytes__nf4` JSON in bytes; with double quantization `absmax` is uint8
and `P.weight.nested_*` are the scales of scales. 8 bits: `P.weight` int8 and `P.SCB`, the largest
magnitude of each row. What bitsandbytes has left alone lies beside them as it was.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.bnb import BlockSpan, NestedScales, dequantize_span, load
from quant.checkpoint import Checkpoint, TensorInfo
from quant.errors import QuantError

_STATE = ".quant_state.bitsandbytes__"
_SCB = ".SCB"
_TYPES = ("nf4", "fp4")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DAMAGED_HINT = "the checkpoint is incomplete or damaged; download it again"


@dataclass(frozen=True)
class PackedTensor(ABC):
    """A float tensor that is stored as several others."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    companions: tuple[str, ...]  # the others that belong to it

    @abstractmethod
    def check(self, stored: Checkpoint) -> None:
        """Raise QuantError unless everything is there and fits."""

    @abstractmethod
    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension, reading no more than they need."""


@dataclass(frozen=True)
class BnbCheckpoint(Checkpoint):
    """A checkpoint whose packed tensors look like the float tensors they stand for."""

    stored: Checkpoint
    packed: Mapping[str, PackedTensor]

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().read(name)
        return self.read_rows(name, 0, self.packed[name].shape[0])

    def read_slice(self, name: str, index: int) -> Tensor:
        if name not in self.packed:
            return super().read_slice(name, index)
        return self.read_rows(name, index, index + 1)[0]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.packed:
            return super().read_rows(name, start, stop)
        return self.packed[name].rows(self.stored, start, stop)


def open_source(path: Path) -> Checkpoint:
    """A checkpoint to convert from, with float tensors wherever bitsandbytes has packed them.

    Raises QuantError where something is missing, damaged or pickled.
    """
    stored = Checkpoint.open(path)
    packed = {tensor.name: tensor for tensor in _packed_tensors(stored)}
    if not packed:
        return stored
    load()
    tensors = dict(stored.tensors)
    for name, tensor in packed.items():
        tensor.check(stored)
        info = stored.info(name)
        nbytes = info.nbytes + sum(tensors.pop(part).nbytes for part in tensor.companions)
        tensors[name] = TensorInfo(info.file, tensor.dtype, tensor.shape, info.offset, nbytes)
    return BnbCheckpoint(stored.path, stored.config, stored.files, tensors, stored, packed)


def _packed_tensors(stored: Checkpoint) -> Iterator[PackedTensor]:
    for name in stored.tensors:
        weight, found, quant_type = name.rpartition(_STATE)
        if found:
            yield _four_bit(stored, weight, quant_type)
        elif name.endswith(_SCB):
            yield EightBitTensor.of(stored, name.removesuffix(_SCB))


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
        weight = _require(stored, self.name)
        if len(weight.shape) != 2 or weight.shape[1] != 1 or 2 * weight.nbytes < self.count:
            raise _misfit(self.name, weight.shape, f"does not hold {self.count} values of 4 bits")
        expected = {"absmax": (torch.float32, blocks)}
        if self.nested_block_size:
            nested_blocks = -(-blocks // self.nested_block_size)
            expected = {
                "absmax": (torch.uint8, blocks),
                "nested_absmax": (torch.float32, nested_blocks),
                "nested_quant_map": (torch.float32, 256),
            }
        for part in self.companions:
            _require(stored, part)
        for part, (dtype, count) in expected.items():
            info = _require(stored, f"{self.name}.{part}")
            if info.dtype != dtype or math.prod(info.shape) != count or len(info.shape) != 1:
                raise _misfit(f"{self.name}.{part}", info.shape, f"is not {count} of {dtype}")

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

    @classmethod
    def of(cls, stored: Checkpoint, module: str) -> "EightBitTensor":
        name, layout = f"{module}.weight", f"{module}.weight_format"
        companions = [module + _SCB, *([layout] if layout in stored.tensors else [])]
        return cls(name, torch.float32, _require(stored, name).shape, tuple(companions))

    def check(self, stored: Checkpoint) -> None:
        weight, scale = stored.info(self.name), stored.info(self.companions[0])
        if weight.dtype != torch.int8 or len(weight.shape) != 2:
            raise _misfit(self.name, weight.shape, "is no int8 matrix, though it has an `SCB`")
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise _misfit(self.companions[0], scale.shape, f"is no scale a row of `{self.name}`")
        for layout in self.companions[1:]:
            if int(stored.read(layout)) != 0:
                raise QuantError(
                    f"`{self.name}` lies in the order of an old GPU kernel",
                    "save the model anew with bitsandbytes 0.45 or later, or use the 16-bit one",
                )

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        values: Tensor = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(
            stored.read_rows(self.name, start, stop),
            stored.read_rows(self.companions[0], start, stop),
        )
        return values


def _four_bit(stored: Checkpoint, name: str, quant_type: str) -> FourBitTensor:
    """Read what the JSON beside a packed tensor says; raises QuantError where it makes no sense."""
    state_name = f"{name}{_STATE}{quant_type}"
    try:
        state = json.loads(bytes(stored.read(state_name).tolist()))
        shape, nested = tuple(map(_count, state["shape"])), "nested_offset" in state
        tensor = FourBitTensor(
            name=name,
            dtype=_DTYPES[state["dtype"]],
            shape=shape,
            companions=tuple(_companions(state_name, name, nested)),
            quant_type=state["quant_type"],
            block_size=state["blocksize"],
            nested_block_size=_count(state["nested_blocksize"]) if nested else 0,
            nested_offset=float(state["nested_offset"]) if nested else 0.0,
        )
        if tensor.quant_type not in _TYPES or tensor.block_size not in _BLOCK_SIZES or not shape:
            raise ValueError
    except (ValueError, TypeError, KeyError) as error:
        raise QuantError(
            f"`{state_name}` is no description of a packed tensor", _DAMAGED_HINT
        ) from error
    return tensor


def _companions(state_name: str, name: str, nested: bool) -> list[str]:
    parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    return [state_name, *(f"{name}.{part}" for part in parts)]


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _require(stored: Checkpoint, name: str) -> TensorInfo:
    if name not in stored.tensors:
        raise QuantError(
            f"`{stored.path}` lacks `{name}`, which bitsandbytes stores with the others",
            _DAMAGED_HINT,
        )
    return stored.info(name)


def _misfit(name: str, shape: tuple[int, ...], fault: str) -> QuantError:
    return QuantError(f"`{name}` of shape {list(shape)} {fault}", _DAMAGED_HINT)
