"""Knows which files a conversion writes and what lies where in them, from shapes alone.

A file is a header and then units, one after the other; a unit is what is written, checked and
resumed as a whole: one projection of an expert, a dense tensor, or bytes known beforehand. It
comes from one tensor of the source. Experts come first, each on a multiple
of 4096 bytes. safetensors allows no gaps, so a uint8 tensor fills each hole.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from quant.checkpoint import SINGLE_FILE, Checkpoint
from quant.errors import QuantError
from quant.items import (
    DenseItem,
    ExpertItem,
    TensorSlice,
    matrix_shape,
    shape_of,
    stored_nbytes,
)
from quant.layout import SLOT_ALIGNMENT, ExpertLayout
from quant.safetensors_file import TensorEntry, build_header
from quant.scheme import QuantScheme

# Every reader knows that old checkpoints hold stray `rotary_emb.inv_freq` tensors and skips them:
# transformers without a warning, vLLM where it would refuse any other unknown name.
FILLER_PREFIX = "moecli.padding."
_FILLER_NAME = FILLER_PREFIX + "{}.rotary_emb.inv_freq"


@dataclass(frozen=True)
class OutputTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """A run of bytes: tensors made of a slice of the source, or `constant`."""

    tensors: tuple[OutputTensor, ...]
    constant: bytes = b""
    source: TensorSlice | None = None
    scheme: QuantScheme | None = None  # None: a source is kept as it is
    label: str = ""  # for people
    expert: tuple[int, int] | None = None  # layer and expert, of its first projection
    of_expert: bool = False
    source_nbytes: int = 0
    num_weights: int = 0
    linear: tuple[str, tuple[int, int]] | None = None  # of a quantized one: name, [O, I]

    @property
    def nbytes(self) -> int:
        return len(self.constant) or sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class PlacedUnit:
    """A unit and where it goes: which file, its number there, the offset in bytes."""

    shard: int
    number: int
    offset: int
    unit: Unit


@dataclass(frozen=True)
class Shard:
    """One file; the first unit is its header."""

    name: str
    units: tuple[Unit, ...]
    entries: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


@dataclass(frozen=True)
class OutputPlan:
    """All files with weights, and where experts lie: experts[layer][expert] = (file, offset)."""

    shards: tuple[Shard, ...]
    layout: ExpertLayout
    experts: dict[int, list[tuple[str, int]]]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def units(self) -> list[Unit]:
        return [unit for shard in self.shards for unit in shard.units]

    @property
    def bpw_experts(self) -> float:
        """Stored bits a weight, scales included."""
        return self.layout.nbytes * 8 / self.layout.num_weights

    @property
    def bpw(self) -> float:
        """The same of all weights, those kept in 16 bits included."""
        nbytes = sum(t.nbytes for u in self.units for t in u.tensors if u.source is not None)
        return nbytes * 8 / self.num_weights

    @property
    def num_weights(self) -> int:
        return sum(unit.num_weights for unit in self.units)

    @property
    def source_nbytes(self) -> int:
        return sum(unit.source_nbytes for unit in self.units)

    @cached_property
    def placed(self) -> list[PlacedUnit]:
        """All units in the order of their bytes."""
        placed = []
        for number, shard in enumerate(self.shards):
            ends = accumulate((unit.nbytes for unit in shard.units), initial=0)
            for place, (offset, unit) in enumerate(zip(ends, shard.units, strict=False)):
                placed.append(PlacedUnit(number, place, offset, unit))
        return placed


def plan_output(
    source: Checkpoint,
    scheme: QuantScheme,
    experts: Sequence[ExpertItem],
    dense: Sequence[DenseItem],
    shard_nbytes: int,
) -> OutputPlan:
    """Raises QuantError, naming the tensor, where a source tensor is missing or does not fit."""
    assert experts, "a model without experts is not converted"
    layout = _layout(source, experts[0], scheme)
    runs = [_expert_units(source, item, layout) for item in experts]
    # Whole words before halves: then hardly any filler is needed for alignment.
    ordered = sorted(dense, key=lambda item: item.scheme is None)
    runs += [[_dense_unit(source, item)] for item in ordered]
    groups = _split(runs, shard_nbytes)
    names = (
        [SINGLE_FILE]
        if len(groups) == 1
        else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    )
    fillers = _Fillers()
    shards = tuple(
        _build_shard(name, group, fillers) for name, group in zip(names, groups, strict=True)
    )
    return OutputPlan(shards, layout, _expert_table(shards))


def _layout(source: Checkpoint, item: ExpertItem, scheme: QuantScheme) -> ExpertLayout:
    intermediate, hidden = matrix_shape(source, item.gate)
    for part, (out_features, in_features) in (
        (item.gate, (intermediate, hidden)),
        (item.down, (hidden, intermediate)),
    ):
        scheme.check_shape(part.name, out_features, in_features)
    return ExpertLayout(hidden, intermediate, scheme)


def _expert_units(source: Checkpoint, item: ExpertItem, layout: ExpertLayout) -> list[Unit]:
    units: list[Unit] = []
    for (projection, part), written in zip(item.projections.items(), item.names, strict=True):
        shape, expected = matrix_shape(source, part), layout.projections[projection]
        if shape != expected:
            raise QuantError(
                f"`{part.name}` gives the {projection} of `{item.prefix}` as {list(shape)}, "
                f"where {list(expected)} is needed",
                "the checkpoint and its config do not belong together; download both again",
            )
        name = f"{item.prefix}.{written}"
        unit = Unit(
            _quantized(name, shape, layout.scheme),
            source=part,
            scheme=layout.scheme,
            label=item.prefix,
            expert=None if units else (item.layer, item.expert),
            of_expert=True,
            source_nbytes=stored_nbytes(source, part),
            num_weights=math.prod(shape),
            linear=(name, shape),
        )
        units.append(unit)
    return units


def _dense_unit(source: Checkpoint, item: DenseItem) -> Unit:
    info, shape = source.info(item.source.name), shape_of(source, item.source)
    unit = Unit(
        (OutputTensor(item.name, info.dtype if item.exact else kept_dtype(info.dtype), shape),),
        source=item.source,
        label=item.name,
        source_nbytes=stored_nbytes(source, item.source),
        num_weights=math.prod(shape),
    )
    if item.scheme is None:
        return unit
    matrix = matrix_shape(source, item.source)
    item.scheme.check_shape(item.source.name, *matrix)
    tensors = _quantized(item.name, matrix, item.scheme)
    return replace(unit, tensors=tensors, scheme=item.scheme, linear=(item.name, matrix))


def _quantized(
    name: str, shape: tuple[int, int], scheme: QuantScheme
) -> tuple[OutputTensor, OutputTensor]:
    return (
        OutputTensor(f"{name}.weight_packed", torch.int32, scheme.packed_shape(*shape)),
        OutputTensor(f"{name}.weight_scale", torch.bfloat16, scheme.scale_shape(*shape)),
    )


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor that is not quantized is stored as."""
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def _split(runs: Sequence[Sequence[Unit]], shard_nbytes: int) -> list[list[Unit]]:
    """In order, as many runs a file as stay within `shard_nbytes`, at least one."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for run in runs:
        nbytes = sum(unit.nbytes for unit in run) + SLOT_ALIGNMENT  # what filler and shapes need
        if groups[-1] and size + nbytes > shard_nbytes:
            groups.append([])
            size = 0
        groups[-1] += run
        size += nbytes
    return groups


class _Fillers:
    """Numbers the tensors that fill holes, through all files."""

    def __init__(self) -> None:
        self.count = 0

    def up_to(self, offset: int, alignment: int) -> list[Unit]:
        """What must be written at `offset` so that the next tensor is aligned."""
        nbytes = -offset % alignment
        if not nbytes:
            return []
        name = _FILLER_NAME.format(self.count)
        self.count += 1
        return [Unit((OutputTensor(name, torch.uint8, (nbytes,)),), bytes(nbytes))]


def _build_shard(name: str, group: Sequence[Unit], fillers: _Fillers) -> Shard:
    units: list[Unit] = []
    offset = 0  # from the beginning of the tensors, which is a multiple of 4096

    def add(unit: Unit, alignment: int) -> None:
        nonlocal offset
        for each in (*fillers.up_to(offset, alignment), unit):
            units.append(each)
            offset += each.nbytes

    for unit in group:
        if unit.of_expert:
            add(unit, SLOT_ALIGNMENT if unit.expert else 1)
    shapes = _shapes_unit(group)
    if shapes is not None:
        add(shapes, torch.int64.itemsize)
    for unit in group:
        if not unit.of_expert:
            add(unit, unit.tensors[0].dtype.itemsize)
    header, entries = build_header(
        (tensor.name, tensor.dtype, tensor.shape) for unit in units for tensor in unit.tensors
    )
    return Shard(name, (Unit((), header), *units), entries)


def _shapes_unit(group: Sequence[Unit]) -> Unit | None:
    """The weight_shape of every quantized Linear of a file: readers of the format need them."""
    linears = [unit.linear for unit in group if unit.linear is not None]
    if not linears:
        return None
    tensors = [OutputTensor(f"{name}.weight_shape", torch.int64, (2,)) for name, _ in linears]
    sizes = [size for _, shape in linears for size in shape]
    return Unit(tuple(tensors), b"".join(size.to_bytes(8, "little") for size in sizes))


def _expert_table(shards: Sequence[Shard]) -> dict[int, list[tuple[str, int]]]:
    found: dict[int, dict[int, tuple[str, int]]] = defaultdict(dict)
    for shard in shards:
        for unit in shard.units:
            if unit.expert is not None:
                (layer, expert), offset = unit.expert, shard.entries[unit.tensors[0].name].offset
                assert offset % SLOT_ALIGNMENT == 0, f"`{unit.label}` begins at {offset}"
                assert expert not in found[layer], f"`{unit.label}` is written twice"
                found[layer][expert] = (shard.name, offset)
    for layer, table in found.items():
        assert set(table) == set(range(len(table))), f"layer {layer} lacks experts"
    return {
        layer: [found[layer][expert] for expert in range(len(found[layer]))]
        for layer in sorted(found)
    }
