"""Knows the bytes of one expert, in the file, in memory and on the device; knows no addresses."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from quant.scheme import WORD_BITS, QuantScheme
from quant.tensor import QuantizedWeight

SLOT_ALIGNMENT = 4096
_WORD_NBYTES = 4


@dataclass(frozen=True)
class Part:
    """One tensor of an expert and where it lies in the expert's bytes."""

    name: str  # "gate_proj.weight_packed", ...
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: int
    nbytes: int


class Runs(NamedTuple):
    """`num_runs` of `nbytes` each, `pitch` bytes from the beginning of one to the next."""

    offset: int
    nbytes: int
    num_runs: int
    pitch: int


@dataclass(frozen=True)
class ExpertWeights:
    """The three projections of one expert: [intermediate, hidden] twice, [hidden, intermediate]."""

    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight

    def part(self, begin: int, end: int) -> "ExpertWeights":
        """Intermediate rows begin..end-1 alone, for down those columns; shares the memory."""
        scheme = self.down.scheme
        words = slice(begin * scheme.bits // WORD_BITS, end * scheme.bits // WORD_BITS)
        groups = slice(begin // scheme.group_size, end // scheme.group_size)
        return ExpertWeights(
            QuantizedWeight(self.gate.packed[begin:end], self.gate.scale[begin:end], scheme),
            QuantizedWeight(self.up.packed[begin:end], self.up.scale[begin:end], scheme),
            QuantizedWeight(self.down.packed[:, words], self.down.scale[:, groups], scheme),
        )


@dataclass(frozen=True)
class ExpertLayout:
    """One expert as one run of bytes: gate, up, down, each packed words followed by scales."""

    hidden_size: int
    intermediate_size: int
    scheme: QuantScheme

    def __post_init__(self) -> None:
        for name, (out_features, in_features) in self.projections.items():
            self.scheme.check_shape(name, out_features, in_features)
        for part in self.parts:
            assert part.offset % _WORD_NBYTES == 0, f"`{part.name}` does not begin on a word"

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name -> (out_features, in_features), in the order of the bytes."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "gate_proj": (intermediate, hidden),
            "up_proj": (intermediate, hidden),
            "down_proj": (hidden, intermediate),
        }

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The six tensors, in the order of the bytes, without gaps."""
        parts: list[Part] = []
        offset = 0
        for name, shape in self.projections.items():
            for suffix, dtype, part_shape, nbytes in (
                (
                    "weight_packed",
                    torch.int32,
                    self.scheme.packed_shape(*shape),
                    self.scheme.packed_nbytes(*shape),
                ),
                (
                    "weight_scale",
                    torch.bfloat16,
                    self.scheme.scale_shape(*shape),
                    self.scheme.scale_nbytes(*shape),
                ),
            ):
                parts.append(Part(f"{name}.{suffix}", dtype, part_shape, offset, nbytes))
                offset += nbytes
        return tuple(parts)

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def slot_nbytes(self) -> int:
        """`nbytes` rounded up, so that slots and file ranges begin on pages."""
        return -(-self.nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def num_weights(self) -> int:
        return sum(o * i for o, i in self.projections.values())

    def views(self, blob: Tensor) -> ExpertWeights:
        """The expert that `blob`, uint8 [at least nbytes], holds; shares its memory."""
        assert blob.dtype == torch.uint8, f"a blob is bytes, not {blob.dtype}"
        assert blob.numel() >= self.nbytes, f"{blob.numel()} bytes hold no expert of {self.nbytes}"
        tensors = [
            blob[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
            for part in self.parts
        ]
        gate, up, down = (
            QuantizedWeight(packed, scale, self.scheme)
            for packed, scale in zip(tensors[0::2], tensors[1::2], strict=True)
        )
        return ExpertWeights(gate, up, down)

    def write(self, weights: ExpertWeights, blob: Tensor) -> None:
        """Copy an expert's tensors into `blob`, uint8 [at least nbytes]."""
        target = self.views(blob)
        for name in ("gate", "up", "down"):
            source, destination = getattr(weights, name), getattr(target, name)
            assert source.scheme == self.scheme, f"`{name}` is {source.scheme.name}"
            assert source.scale.shape == destination.scale.shape, f"`{name}` has a wrong shape"
            destination.packed.copy_(source.packed)
            destination.scale.copy_(source.scale)

    def check_span(self, begin: int, end: int) -> None:
        """Assert that intermediate rows begin..end-1 are some, and whole groups of down."""
        group_size = self.scheme.group_size
        assert 0 <= begin < end <= self.intermediate_size, (
            f"{begin}..{end} is no part of {self.intermediate_size} intermediate rows"
        )
        assert begin % group_size == end % group_size == 0, (
            f"{begin}..{end} cuts groups of {group_size}"
        )

    def runs(self, begin: int, end: int) -> tuple[Runs, ...]:
        """Where in an expert's bytes intermediate rows begin..end-1 lie, in the order of the bytes.

        Whole rows of gate and up, of down those columns of every row.
        """
        self.check_span(begin, end)
        found: list[Runs] = []
        for part in self.parts:
            down = part.name.startswith("down_proj")
            count = part.shape[0] if down else 1
            pitch = part.nbytes // count
            first, last = (at * pitch // self.intermediate_size for at in (begin, end))
            found.append(Runs(part.offset + first, last - first, count, pitch))
        return tuple(found)

    def restricted(self, begin: int, end: int) -> "ExpertLayout":
        """The layout of the expert that has intermediate rows begin..end-1 alone."""
        self.check_span(begin, end)
        return replace(self, intermediate_size=end - begin)

    def cut(self, blob: Tensor, begin: int, end: int, out: Tensor) -> None:
        """Copy intermediate rows begin..end-1 of the expert in `blob` into `out`, as an expert of
        `restricted(begin, end)`: experts of two such halves add up to the whole one.
        """
        self.restricted(begin, end).write(self.views(blob).part(begin, end), out)
