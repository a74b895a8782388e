"""Knows the safetensors format, strictly; knows nothing of models or of what the tensors mean.

A file: 8 bytes little-endian length n, n bytes of JSON (padded with spaces), then the tensors'
bytes, which cover the rest of the file without gaps or overlaps. Everything is checked against
the size of the file before anything is allocated. Bytes are read with pread into fresh memory, so
that the resident size of a process is that of the tensors it holds.
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_NBYTES = 8
_MAX_HEADER_NBYTES = 100_000_000
_MAX_ELEMENTS = 2**63 - 1
DATA_ALIGNMENT = 4096
_LARGE_NBYTES = 4 << 20  # smaller ones are read often: new pages would cost more than reading
_DAMAGED = "the file is damaged or still being written; download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file; `offset` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header has been read and found consistent."""

    path: Path
    nbytes: int
    header: bytes  # the JSON text
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header; raises QuantError saying what is wrong with it."""
        try:
            with path.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                prefix = file.read(LENGTH_NBYTES)
                header = file.read(header_nbytes(path, prefix, nbytes))
        except OSError as error:
            raise QuantError(f"cannot read `{path}`: {error.strerror}") from error
        return cls(path, nbytes, header, parse_header(path, header, nbytes))

    def read(self, name: str) -> Tensor:
        """One tensor, in fresh memory."""
        entry = self.entries[name]
        return self._read_bytes(name, entry.offset, entry.dtype, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension; only these bytes are read."""
        entry = self.entries[name]
        assert entry.shape, f"`{name}` is a scalar"
        assert 0 <= start <= stop <= entry.shape[0], f"`{name}` has no rows {start}:{stop}"
        row_nbytes = entry.nbytes // max(1, entry.shape[0])
        shape = (stop - start, *entry.shape[1:])
        return self._read_bytes(name, entry.offset + start * row_nbytes, entry.dtype, shape)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix; only these bytes are read."""
        entry = self.entries[name]
        assert len(entry.shape) == 2, f"`{name}` is no matrix"
        rows, columns = entry.shape
        assert 0 <= start <= stop <= columns, f"`{name}` has no columns {start}:{stop}"
        row_nbytes, begin = columns * entry.dtype.itemsize, start * entry.dtype.itemsize
        tensor = _fresh((rows, stop - start), entry.dtype)
        offsets = range(entry.offset + begin, entry.offset + begin + rows * row_nbytes, row_nbytes)
        self._fill(name, tensor, offsets)
        return tensor

    def read_slice(self, name: str, index: int) -> Tensor:
        """tensor[index] along the first dimension; only these bytes are read."""
        return self.read_rows(name, index, index + 1)[0]

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, whatever they mean."""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise QuantError(f"cannot read `{self.path}`: {error.strerror}") from error

    def _read_bytes(
        self, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        tensor = _fresh(shape, dtype)
        self._fill(name, tensor, (offset,))
        return tensor

    def _fill(self, name: str, tensor: Tensor, offsets: Sequence[int]) -> None:
        """Read as many bytes at each offset, one after the other, as make the tensor."""
        memory = memory_of(tensor)
        size = len(memory) // max(1, len(offsets))
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                complete = all(
                    _fill(descriptor, memory[number * size : (number + 1) * size], offset)
                    for number, offset in enumerate(offsets)
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            raise QuantError(
                f"cannot read `{name}` from `{self.path}`: {error.strerror}"
            ) from error
        if not complete:
            raise QuantError(f"`{self.path}` ends inside `{name}`", _DAMAGED)


def _fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor. A large one has pages of its own, which go back to the system with it:
    an allocator would keep them between the small things that were asked for meanwhile.
    """
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes <= _LARGE_NBYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(
        mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype
    ).view(shape)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, not copied; valid while the tensor lives."""
    assert tensor.is_contiguous(), "only contiguous tensors are runs of bytes"
    assert tensor.device.type == "cpu", "only tensors of the CPU have bytes to point at"
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr() or 0)
    return memoryview(array).cast("B")


def write_fully(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`: the system may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the tensors, and where each tensor then lies, in the order given.

    Spaces pad the header so that the tensors begin on a multiple of DATA_ALIGNMENT.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, TensorEntry] = {}
    end = 0
    for name, dtype, shape in tensors:
        assert name not in fields, f"`{name}` is written twice"
        nbytes = dtype.itemsize * math.prod(shape)
        relative[name] = TensorEntry(dtype, shape, end, nbytes)
        fields[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    begin = -(-(LENGTH_NBYTES + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    length = begin - LENGTH_NBYTES
    assert length <= _MAX_HEADER_NBYTES, f"a header of {length} bytes is too long"
    entries = {
        name: TensorEntry(e.dtype, e.shape, begin + e.offset, e.nbytes)
        for name, e in relative.items()
    }
    return length.to_bytes(LENGTH_NBYTES, "little") + text.ljust(length), entries


def _fill(descriptor: int, view: memoryview, offset: int) -> bool:
    """Read until `view` is full; False when the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def header_nbytes(path: Path, prefix: bytes, nbytes: int) -> int:
    """Length of the JSON text of a file of `nbytes` bytes that begins with `prefix`, 8 bytes."""
    if len(prefix) < LENGTH_NBYTES:
        raise QuantError(f"`{path}` is too short for a safetensors file", _DAMAGED)
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_NBYTES or LENGTH_NBYTES + length > nbytes:
        raise QuantError(
            f"`{path}` claims a header of {length} bytes, the file has {nbytes}", _DAMAGED
        )
    return length


def parse_header(path: Path, header: bytes, nbytes: int) -> dict[str, TensorEntry]:
    """Where tensors lie in a file of `nbytes` bytes; raises QuantError where they cannot."""
    data_nbytes = nbytes - LENGTH_NBYTES - len(header)
    begin = LENGTH_NBYTES + len(header)
    try:
        fields = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        fields.pop("__metadata__", None)
        entries = {name: _parse_entry(name, field, begin) for name, field in fields.items()}
        _check_coverage(entries, begin, data_nbytes)
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise QuantError(f"the header of `{path}` is wrong: {error}", _DAMAGED) from error
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` occurs twice")
    return fields


def _parse_entry(name: str, field: Any, begin: int) -> TensorEntry:
    """Raises ValueError unless dtype, shape and offsets are well formed and agree."""
    if not isinstance(field, dict) or not field.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"`{name}` lacks dtype, shape or data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"`{name}` has the unknown dtype {dtype!r:.40}")
    if not _are_counts(shape):
        raise ValueError(f"`{name}` has the impossible shape {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"`{name}` has the impossible offsets {offsets!r:.80}")
    # Zeros are left out so that no product of the other dimensions can overflow later.
    if len(shape) > 64 or math.prod(size for size in shape if size) * 8 > _MAX_ELEMENTS:
        raise ValueError(f"`{name}` has the impossible shape {shape!r:.80}")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"`{name}` has {nbytes} bytes, which is not {dtype} {shape!r:.80}")
    return TensorEntry(DTYPES[dtype], tuple(shape), begin + offsets[0], nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_coverage(entries: Mapping[str, TensorEntry], begin: int, data_nbytes: int) -> None:
    """Raises ValueError unless the tensors cover the data exactly once."""
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset + entry.nbytes > begin + data_nbytes:
            missing = entry.offset + entry.nbytes - begin - data_nbytes
            raise ValueError(f"`{name}` ends {missing} bytes after the end of the file")
        if entry.offset < end:
            raise ValueError(f"`{name}` overlaps the tensor before it")
        if entry.offset > end:
            raise ValueError(f"{entry.offset - end} bytes before `{name}` belong to no tensor")
        end = entry.offset + entry.nbytes
    if end != begin + data_nbytes:
        raise ValueError(f"{begin + data_nbytes - end} bytes at the end belong to no tensor")
