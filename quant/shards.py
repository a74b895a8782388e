"""Knows which files a conversion writes and what lies where in them, from shapes alone.

A file is a header and then units, one after the other; a unit is what is written, checked and
resumed as a whole: an expert, a dense tensor, or bytes known beforehand. Experts come first, each
on a multiple of 4096 bytes. safetensors allows no gaps, so a uint8 tensor fills each hole.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quant.checkpoint import SINGLE_FILE, Checkpoint
from quant.errors import QuantError
from quant.items import DenseItem, ExpertItem, matrix_shape, shape_of, stored_nbytes
from quant.layout import SLOT_ALIGNMENT, ExpertLayout
from quant.safetensors_file import TensorEntry, build_header
from quant.scheme import QuantScheme

# Every reader knows that old checkpoints hold stray `rotary_emb.inv_freq` tensors and skips them:
# transformers without a warning, vLLM where it would refuse any other unknown name.
_FILLER_NAME = "moecli.padding.{}.rotary_emb.inv_freq"


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
    """A run of bytes: the tensors of an item, or `constant`."""

    item: ExpertItem | DenseItem | None
    tensors: tuple[OutputTensor, ...]
    constant: bytes = b""
    source_nbytes: int = 0
    num_weights: int = 0
    linears: tuple[tuple[str, tuple[int, int]], ...] = ()  # quantized ones: name, [O, I]

    @property
    def nbytes(self) -> int:
        return len(self.constant) or sum(tensor.nbytes for tensor in self.tensors)

    @property
    def label(self) -> str:
        if isinstance(self.item, ExpertItem):
            return self.item.prefix
        return self.item.name if self.item else "header"


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
    units = [_expert_unit(source, item, layout) for item in experts]
    # Whole words before halves: then hardly any filler is needed for alignment.
    ordered = sorted(dense, key=lambda item: item.scheme is None)
    units += [_dense_unit(source, item) for item in ordered]
    groups = _split(units, shard_nbytes)
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


def _expert_unit(source: Checkpoint, item: ExpertItem, layout: ExpertLayout) -> Unit:
    source_nbytes = 0
    for projection, part in item.projections.items():
        shape, expected = matrix_shape(source, part), layout.projections[projection]
        if shape != expected:
            raise QuantError(
                f"`{part.name}` gives the {projection} of `{item.prefix}` as {list(shape)}, "
                f"where {list(expected)} is needed",
                "the checkpoint and its config do not belong together; download both again",
            )
        source_nbytes += stored_nbytes(source, part)
    tensors = tuple(
        OutputTensor(f"{item.prefix}.{part.name}", part.dtype, part.shape) for part in layout.parts
    )
    linears = tuple((f"{item.prefix}.{n}", shape) for n, shape in layout.projections.items())
    return Unit(item, tensors, b"", source_nbytes, layout.num_weights, linears)


def _dense_unit(source: Checkpoint, item: DenseItem) -> Unit:
    info, shape = source.info(item.source.name), shape_of(source, item.source)
    count = math.prod(shape)
    source_nbytes = stored_nbytes(source, item.source)
    if item.scheme is None:
        kept = OutputTensor(item.name, kept_dtype(info.dtype), shape)
        return Unit(item, (kept,), b"", source_nbytes, count)
    matrix = matrix_shape(source, item.source)
    item.scheme.check_shape(item.source.name, *matrix)
    packed, scale = item.scheme.packed_shape(*matrix), item.scheme.scale_shape(*matrix)
    tensors = (
        OutputTensor(f"{item.name}.weight_packed", torch.int32, packed),
        OutputTensor(f"{item.name}.weight_scale", torch.bfloat16, scale),
    )
    return Unit(item, tensors, b"", source_nbytes, count, ((item.name, matrix),))


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor that is not quantized is stored as."""
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def _split(units: Sequence[Unit], shard_nbytes: int) -> list[list[Unit]]:
    """In order, as many units a file as stay within `shard_nbytes`, at least one."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        nbytes = unit.nbytes + SLOT_ALIGNMENT  # whatever filler and shapes will need
        if groups[-1] and size + nbytes > shard_nbytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
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
        return [Unit(None, (OutputTensor(name, torch.uint8, (nbytes,)),), bytes(nbytes))]


def _build_shard(name: str, group: Sequence[Unit], fillers: _Fillers) -> Shard:
    units: list[Unit] = []
    offset = 0  # from the beginning of the tensors, which is a multiple of 4096

    def add(unit: Unit, alignment: int) -> None:
        nonlocal offset
        for each in (*fillers.up_to(offset, alignment), unit):
            units.append(each)
            offset += each.nbytes

    for unit in group:
        if isinstance(unit.item, ExpertItem):
            add(unit, SLOT_ALIGNMENT)
    shapes = _shapes_unit(group)
    if shapes is not None:
        add(shapes, torch.int64.itemsize)
    for unit in group:
        if isinstance(unit.item, DenseItem):
            add(unit, unit.tensors[0].dtype.itemsize)
    header, entries = build_header(
        (tensor.name, tensor.dtype, tensor.shape) for unit in units for tensor in unit.tensors
    )
    return Shard(name, (Unit(None, (), header), *units), entries)


def _shapes_unit(group: Sequence[Unit]) -> Unit | None:
    """The weight_shape of every quantized Linear of a file: readers of the format need them."""
    linears = [linear for unit in group for linear in unit.linears]
    if not linears:
        return None
    tensors = [OutputTensor(f"{name}.weight_shape", torch.int64, (2,)) for name, _ in linears]
    sizes = [size for _, shape in linears for size in shape]
    return Unit(None, tuple(tensors), b"".join(size.to_bytes(8, "little") for size in sizes))


def _expert_table(shards: Sequence[Shard]) -> dict[int, list[tuple[str, int]]]:
    found: dict[int, dict[int, tuple[str, int]]] = defaultdict(dict)
    for shard in shards:
        for unit in shard.units:
            if isinstance(unit.item, ExpertItem):
                item, offset = unit.item, shard.entries[unit.tensors[0].name].offset
                assert offset % SLOT_ALIGNMENT == 0, f"`{item.prefix}` begins at {offset}"
                assert item.expert not in found[item.layer], f"`{item.prefix}` is written twice"
                found[item.layer][item.expert] = (shard.name, offset)
    for layer, table in found.items():
        assert set(table) == set(range(len(table))), f"layer {layer} lacks experts"
    return {
        layer: [found[layer][expert] for expert in range(len(found[layer]))]
        for layer in sorted(found)
    }
