"""Knows how the bytes of units are made of slices of the source, by threads that read, dequantize
and quantize some blocks ahead of what is written; knows no order of work.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.items import SliceReader, TensorSlice
from quant.quantize import SquaredError, quantize_measured
from quant.safetensors_file import memory_of
from quant.scheme import QuantScheme
from quant.shard_writer import ShardWriter, writing
from quant.shards import PlacedUnit, Unit
from quant.workers import Workers


@dataclass(frozen=True)
class WrittenUnit:
    """A unit whose bytes are at their place, their CRC-32, and the error of quantizing it."""

    placed: PlacedUnit
    checksum: int
    error: SquaredError


@dataclass(frozen=True)
class _Block:
    """Rows of a unit that are still to be read; None where its bytes are known beforehand."""

    placed: PlacedUnit
    read: Callable[[], Tensor] | None
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class _Made:
    """What became of a block. The scales of a unit come when all its integers are written."""

    block: _Block
    content: bytes | Tensor
    scale: Tensor | None = None
    error: SquaredError = SquaredError()  # noqa: RUF009 frozen


@dataclass(frozen=True)
class UnitWriter:
    """Makes units in the order given, with the blocks of several at work at the same time."""

    reader: SliceReader
    workers: Workers

    def write(
        self, units: Iterable[PlacedUnit], open_writer: Callable[[int], ShardWriter]
    ) -> Iterator[WrittenUnit]:
        """Each unit when it is written. `open_writer` gives the file of a number.

        Raises QuantError for weights that are not finite, and where a file cannot be written.
        """
        scales: list[Tensor] = []
        error = SquaredError()
        for made in self.workers.map(_make, self._blocks(units)):
            placed = made.block.placed
            writer = open_writer(placed.shard)
            with writing(writer.path):
                if made.block.is_first:
                    writer.begin(placed.offset)
                    scales, error = [], SquaredError()
                content = made.content
                writer.write(memory_of(content) if isinstance(content, Tensor) else content)
                error += made.error
                if made.scale is not None:
                    scales.append(made.scale)
                if made.block.is_last:
                    for scale in scales:
                        writer.write(memory_of(scale))
            if made.block.is_last:
                yield WrittenUnit(placed, writer.checksum, error)

    def _blocks(self, units: Iterable[PlacedUnit]) -> Iterator[_Block]:
        for placed in units:
            part = placed.unit.source
            if part is None:
                yield _Block(placed, None, True, True)
                continue
            reads = self.reader.reads(part)
            read, is_first = next(reads, None), True  # None: a tensor without values
            for following in reads:
                yield _Block(placed, read, is_first, False)
                read, is_first = following, False
            yield _Block(placed, read, is_first, True)


def _make(block: _Block) -> _Made:
    unit = block.placed.unit
    if block.read is None:
        return _Made(block, unit.constant)
    assert unit.source is not None, "what is read has a source"
    if unit.scheme is None:
        return _Made(block, _kept(block.read(), unit, unit.source))
    return _quantized(block, block.read(), unit.source, unit.scheme)


def _quantized(block: _Block, rows: Tensor, part: TensorSlice, scheme: QuantScheme) -> _Made:
    try:
        weight, error = quantize_measured(rows, scheme)
    except QuantError as failure:
        raise QuantError(f"`{part.name}`: {failure.message}", failure.hint) from failure
    return _Made(block, weight.packed, weight.scale, error)


def _kept(rows: Tensor, unit: Unit, part: TensorSlice) -> Tensor:
    kept = rows.to(unit.tensors[0].dtype).contiguous()
    if kept.is_floating_point() and kept.numel() and not _is_finite(kept):
        raise QuantError(
            f"`{part.name}` holds NaN or infinite values",
            "the checkpoint is damaged or its training diverged; download it again",
        )
    return kept


def _is_finite(values: Tensor) -> bool:
    """Without a copy of their size; what is not a number is both the least and the greatest."""
    least, greatest = torch.aminmax(values)
    return math.isfinite(least) and math.isfinite(greatest)
