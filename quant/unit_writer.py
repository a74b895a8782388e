"""Knows how the bytes of a unit are made of a slice of the source; knows no order of work."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.items import SliceReader, TensorSlice
from quant.quantize import SquaredError, quantize_measured
from quant.safetensors_file import memory_of
from quant.scheme import QuantScheme
from quant.shard_writer import ShardWriter
from quant.shards import Unit
from quant.tensor import QuantizedWeight
from quant.workers import Workers


@dataclass(frozen=True)
class UnitWriter:
    """Makes units, block by block, on the threads of `workers`."""

    reader: SliceReader
    workers: Workers

    def write(self, unit: Unit, writer: ShardWriter) -> SquaredError:
        """Returns the error that quantizing has made; raises QuantError for weights not finite."""
        if unit.source is None:
            writer.write(unit.constant)
        elif unit.scheme is not None:
            return self._write_linear(unit.source, unit.scheme, writer)
        else:
            self._write_kept(unit.source, unit.tensors[0].dtype, writer)
        return SquaredError()

    def _write_linear(
        self, part: TensorSlice, scheme: QuantScheme, writer: ShardWriter
    ) -> SquaredError:
        """Packed words, block by block, then all scales."""
        scales: list[Tensor] = []
        error = SquaredError()

        def quantized(block: Tensor) -> tuple[QuantizedWeight, SquaredError]:
            try:
                return quantize_measured(block, scheme)
            except QuantError as failure:
                raise QuantError(f"`{part.name}`: {failure.message}", failure.hint) from failure

        for weight, made in self.workers.map(quantized, self.reader.blocks(part)):
            writer.write(memory_of(weight.packed))
            scales.append(weight.scale)
            error += made
        for scale in scales:
            writer.write(memory_of(scale))
        return error

    def _write_kept(self, part: TensorSlice, dtype: torch.dtype, writer: ShardWriter) -> None:
        for block in self.reader.blocks(part):
            kept = block.to(dtype).contiguous()
            if kept.is_floating_point() and not bool(torch.isfinite(kept).all()):
                raise QuantError(
                    f"`{part.name}` holds NaN or infinite values",
                    "the checkpoint is damaged or its training diverged; download it again",
                )
            writer.write(memory_of(kept))
