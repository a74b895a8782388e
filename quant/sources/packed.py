"""Knows how a checkpoint with packed weights looks like one with floats; knows none of the formats.

Legend: O out, I in features; r rows; g group size; G groups a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint, TensorInfo
from quant.errors import QuantError

DAMAGED_HINT = "the checkpoint is incomplete or damaged; download it again"
# What a module may keep for its activations: of no use where weights alone are quantized.
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "activation_scale")


@dataclass(frozen=True)
class PackedTensor(ABC):
    """A float tensor that is stored as others."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[str, ...]  # what is stored; the first tells the place of the whole

    @abstractmethod
    def check(self, stored: Checkpoint) -> None:
        """Raise QuantError unless everything is there and fits."""

    @abstractmethod
    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension, reading no more than they need."""


@dataclass(frozen=True)
class Format:
    """One way of packing: what it is called in `quant_method`, and who knows it."""

    method: str
    title: str  # for people: what of it is read
    packed_tensors: Callable[[Checkpoint, Mapping[str, Any]], Iterable[PackedTensor]]
    form: Callable[[Mapping[str, Any]], str]  # of a `quantization_config`, for people


@dataclass(frozen=True)
class PackedCheckpoint(Checkpoint):
    """A checkpoint whose packed tensors look like the float tensors they stand for."""

    stored: Checkpoint
    packed: Mapping[str, PackedTensor]
    packed_form: str

    @classmethod
    def of(cls, stored: Checkpoint, packed: Iterable[PackedTensor], form: str) -> Checkpoint:
        """Raises QuantError where parts are missing or do not fit."""
        found = {tensor.name: tensor for tensor in packed}
        tensors = dict(stored.tensors)
        for name, tensor in found.items():
            tensor.check(stored)
            place = stored.info(tensor.parts[0])
            nbytes = sum(tensors.pop(part).nbytes for part in tensor.parts)
            tensors[name] = TensorInfo(place.file, tensor.dtype, tensor.shape, place.offset, nbytes)
        return cls(stored.path, stored.config, stored.files, tensors, stored, found, form)

    @property
    def form(self) -> str:
        return self.packed_form

    def files_of(self, name: str) -> frozenset[str]:
        if name not in self.packed:
            return super().files_of(name)
        return frozenset().union(*map(self.stored.files_of, self.packed[name].parts))

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


def modules(stored: Checkpoint, ending: str) -> Iterator[str]:
    """The modules `P` of which there is a tensor `P.ending`."""
    for name in stored.tensors:
        module, found, rest = name.rpartition(f".{ending}")
        if found and not rest:
            yield module


def present(stored: Checkpoint, module: str, *endings: str) -> tuple[str, ...]:
    """Those of the module's tensors that are there."""
    names = (f"{module}.{ending}" for ending in endings)
    return tuple(name for name in names if name in stored.tensors)


def of_activations(stored: Checkpoint, module: str) -> tuple[str, ...]:
    """What goes where the weight goes, and is not read."""
    return present(stored, module, *_OF_ACTIVATIONS)


def require(stored: Checkpoint, name: str) -> TensorInfo:
    """Raises QuantError where a part is missing."""
    if name not in stored.tensors:
        raise QuantError(
            f"`{stored.path}` lacks `{name}`, which belongs to a quantized weight", DAMAGED_HINT
        )
    return stored.info(name)


def misfit(name: str, shape: tuple[int, ...], fault: str) -> QuantError:
    return QuantError(f"`{name}` of shape {list(shape)} {fault}", DAMAGED_HINT)
