"""Knows how a conversion is described: which slice of which source tensor becomes what.

The names come from outside: nothing here knows a model family.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.scheme import QuantScheme

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Tensors that need not be taken whole are read in blocks of about this many bytes.
_BLOCK_NBYTES = 4 << 20
_TRANSPOSED_ROWS = 256


@dataclass(frozen=True)
class TensorSlice:
    """A matrix inside a source tensor: tensor[index], then transposed, then rows[a:b:step]."""

    name: str
    index: int | None = None
    transpose: bool = False
    rows: tuple[int, int] | None = None
    step: int = 1  # 2: every other of these rows


@dataclass(frozen=True)
class ExpertItem:
    """One routed expert, written as `prefix`.gate_proj.weight_packed and so on.

    Some families have other names for the three projections.
    """

    layer: int
    expert: int
    prefix: str
    gate: TensorSlice
    up: TensorSlice
    down: TensorSlice
    names: tuple[str, str, str] = PROJECTIONS  # under which gate, up and down are written

    @property
    def projections(self) -> dict[str, TensorSlice]:
        """By our own names, in the order of the bytes."""
        return dict(zip(PROJECTIONS, (self.gate, self.up, self.down), strict=True))


@dataclass(frozen=True)
class DenseItem:
    """Any other tensor. With a scheme, `name` is that of the Linear (`...q_proj`) and it is
    quantized; without, `name` is that of the tensor and it is kept (fp32 and fp64 become bf16,
    unless it is `exact`).
    """

    name: str
    source: TensorSlice
    scheme: QuantScheme | None
    exact: bool = False


def shape_of(source: Checkpoint, part: TensorSlice) -> tuple[int, ...]:
    """Shape of a slice; raises QuantError, naming the tensor, when there is no such slice."""
    shape = source.info(part.name).shape
    wrong = QuantError(
        f"`{part.name}` has the shape {list(shape)}, which does not fit the model's config.json",
        "the checkpoint and its config do not belong together; download both again",
    )
    if part.index is not None:
        if not shape or part.index >= shape[0]:
            raise wrong
        shape = shape[1:]
    if part.transpose:
        if len(shape) != 2:
            raise wrong
        shape = (shape[1], shape[0])
    if part.rows is not None:
        start, stop = part.rows
        if not shape or not 0 <= start < stop <= shape[0]:
            raise wrong
        shape = (len(range(start, stop, part.step)), *shape[1:])
    return shape


def matrix_shape(source: Checkpoint, part: TensorSlice) -> tuple[int, int]:
    """(out_features, in_features) of a slice that is to be quantized."""
    shape = shape_of(source, part)
    dtype = source.info(part.name).dtype
    if len(shape) != 2:
        raise QuantError(f"`{part.name}` of shape {list(shape)} is no matrix to quantize")
    if dtype not in _FLOATS:
        raise QuantError(
            f"`{part.name}` holds {str(dtype).removeprefix('torch.')}, not bf16, fp16 or fp32",
            "use the original checkpoint, one that is not quantized",
        )
    return shape[0], shape[1]


def stored_nbytes(source: Checkpoint, part: TensorSlice) -> int:
    """What a slice takes of the source's bytes, however they are stored."""
    info = source.info(part.name)
    whole = math.prod(info.shape)
    return info.nbytes * math.prod(shape_of(source, part)) // whole if whole else 0


@dataclass
class SliceReader:
    """Reads slices in blocks of rows; holds at most one fused slice in memory."""

    source: Checkpoint
    _held: tuple[str, int | None] | None = None
    _tensor: Tensor | None = field(default=None, repr=False)

    def blocks(self, part: TensorSlice) -> Iterator[Tensor]:
        """The rows of a slice, in order, some at a time."""
        return (read() for read in self.reads(part))

    def reads(self, part: TensorSlice) -> Iterator[Callable[[], Tensor]]:
        """The same as functions that read them, which any thread may call."""
        shape = shape_of(self.source, part)
        if not shape:
            yield partial(self.source.read, part.name)
            return
        start, stop = part.rows or (0, shape[0])
        row_nbytes = self.source.info(part.name).dtype.itemsize
        for size in shape[1:]:
            row_nbytes *= size
        step = _TRANSPOSED_ROWS if part.transpose else max(1, _BLOCK_NBYTES // max(1, row_nbytes))
        step *= part.step
        for first in range(start, stop, step):
            last = min(first + step, stop)
            every = slice(first, last, part.step)
            if part.transpose:
                yield partial(_transposed, self._hold(part.name, part.index), every)
            elif part.index is not None:
                yield partial(_rows, self._hold(part.name, part.index), every)
            elif part.step == 1:
                yield partial(self.source.read_rows, part.name, first, last)
            else:
                yield partial(_rows, self.source.read_rows(part.name, 0, last), every)

    def release(self) -> None:
        self._held = self._tensor = None

    def _hold(self, name: str, index: int | None) -> Tensor:
        """The slice, read unless it is the one read last: gate and up often share one."""
        if self._held != (name, index) or self._tensor is None:
            self.release()  # before reading, so that two are never held
            read = self.source.read(name) if index is None else self.source.read_slice(name, index)
            self._held, self._tensor = (name, index), read
        return self._tensor


def _rows(matrix: Tensor, rows: slice) -> Tensor:
    return matrix[rows]


def _transposed(matrix: Tensor, rows: slice) -> Tensor:
    """Rows of the transposed: two copies along the grain are faster than one across it."""
    return matrix[:, rows].contiguous().t().contiguous()
