"""Knows directories of safetensors files: foreign ones, and those that moecli has written.

Knows no model family: names mean nothing here, except the suffixes of a quantized weight.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.layout import ExpertLayout
from quant.manifest import MANIFEST_FILE, Manifest
from quant.safetensors_file import SafetensorsFile
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLES = 64  # blocks of a checkpoint that go into its fingerprint, and of each file at least
_SAMPLES_OF_FILE = 2
_BLOCK_NBYTES = 4096
_HASH_NBYTES = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; `offset` counts from the start of its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors; headers are read, tensors are not."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, SafetensorsFile]  # by file name
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Raises QuantError where something is missing, damaged or pickled."""
        if not path.is_dir():
            raise QuantError(f"`{path}` is not a directory", "give the directory of a model")
        read_json(path / CONFIG_FILE)
        _require_files(path, _names_by_file(path))
        return cls.assemble(path, lambda name: SafetensorsFile.open(path / name))

    @classmethod
    def assemble(cls, path: Path, open_file: Callable[[str], SafetensorsFile]) -> "Checkpoint":
        """The checkpoint of the config.json and index in `path`; its files may lie elsewhere."""
        config, names_by_file = read_json(path / CONFIG_FILE), _names_by_file(path)
        files: dict[str, SafetensorsFile] = {}
        tensors: dict[str, TensorInfo] = {}
        for file_name, names in sorted(names_by_file.items()):
            file = files[file_name] = open_file(file_name)
            for name in file.entries if names is None else names:
                entry = file.entries.get(name)
                if entry is None:
                    raise QuantError(
                        f"`{path / file_name}` lacks `{name}`, which `{INDEX_FILE}` promises",
                        "the download is incomplete or mixed; download it again",
                    )
                tensors[name] = TensorInfo(
                    file.path, entry.dtype, entry.shape, entry.offset, entry.nbytes
                )
        return cls(path, config, files, tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises QuantError when there is no such tensor."""
        found = self.tensors.get(name)
        if found is None:
            raise QuantError(
                f"`{self.path}` has no tensor `{name}`",
                "the checkpoint is incomplete, or of another layout than its config.json says",
            )
        return found

    def read(self, name: str) -> Tensor:
        return self._file(name).read(name)

    def read_slice(self, name: str, index: int) -> Tensor:
        """tensor[index] along the first dimension; only these bytes are read."""
        return self._file(name).read_slice(name, index)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along the first dimension; only these bytes are read."""
        return self._file(name).read_rows(name, start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """matrix[:, start:stop]; only these bytes are read."""
        return self._file(name).read_columns(name, start, stop)

    def read_small(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of a few bytes, which may be read before the files are there."""
        return {name: self.read(name) for name in names}

    def files_of(self, name: str) -> frozenset[str]:
        """The names of the files that a tensor is read from."""
        return frozenset((self.info(name).file.name,))

    @property
    def form(self) -> str:
        """How weights are packed, for people; empty where they are plain floats."""
        return ""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the headers, the config and samples of the tensors: tells checkpoints apart.

        It is the same wherever the files lie, and asks little of one that lies elsewhere.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file_name, file in sorted(self.files.items()):
            digest.update(f"{file_name} {file.nbytes}".encode())
            digest.update(file.header)
            for start, stop in sampled_ranges(file.nbytes, len(self.files)):
                digest.update(file.read_bytes(start, stop))
        return digest.hexdigest()

    def _file(self, name: str) -> SafetensorsFile:
        return self.files[self.info(name).file.name]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A directory that moecli has written, with its manifest."""

    checkpoint: Checkpoint
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "QuantizedCheckpoint":
        """Raises QuantError where it is not one, or not of this version, or incomplete."""
        if path.is_dir() and not (path / MANIFEST_FILE).exists():
            raise QuantError(
                f"`{path}` was not written by moecli", f"`moecli quantize {path}` converts it"
            )
        manifest = Manifest.decode(path / MANIFEST_FILE, read_json(path / MANIFEST_FILE))
        for name, record in manifest.files.items():
            file = path / name
            if not file.exists():
                raise QuantError(f"`{file}` is missing", "quantize the model again")
            if file.stat().st_size != record.nbytes:
                raise QuantError(
                    f"`{file}` has {file.stat().st_size} bytes, not {record.nbytes}",
                    "the copy is incomplete; quantize the model again",
                )
        return cls(Checkpoint.open(path), manifest)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def layout(self) -> ExpertLayout:
        return self.manifest.layout

    @property
    def scheme(self) -> QuantScheme:
        return self.layout.scheme

    @property
    def dense_scheme(self) -> QuantScheme | None:
        return self.manifest.dense_scheme

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have routed experts."""
        return tuple(self.manifest.experts)

    def num_experts(self, layer: int) -> int:
        return len(self.manifest.experts[layer])

    def expert_span(self, layer: int, expert: int) -> tuple[Path, int, int]:
        """(file, offset, nbytes) of one expert's bytes."""
        file, offset = self.manifest.experts[layer][expert]
        return self.path / file, offset, self.layout.nbytes

    def dense(self, name: str) -> QuantizedWeight | Tensor:
        """What is not a routed expert, by its name in the source, with or without `.weight`."""
        stem = name.removesuffix(".weight")
        if f"{stem}.weight_packed" not in self.checkpoint.tensors:
            return self.checkpoint.read(name)
        assert self.dense_scheme is not None, f"`{name}` is quantized, the manifest says nothing is"
        return QuantizedWeight(
            self.checkpoint.read(f"{stem}.weight_packed"),
            self.checkpoint.read(f"{stem}.weight_scale"),
            self.dense_scheme,
        )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Hash every file again; raises QuantError naming the first that has changed.

        `progress` is called with (bytes done, bytes in total).
        """
        files = self.manifest.files
        total = sum(record.nbytes for record in files.values())
        done = 0
        for name, record in files.items():
            digest = hashlib.sha256()
            for block in _blocks(self.path / name):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
            if digest.hexdigest() != record.sha256:
                raise QuantError(
                    f"`{self.path / name}` is not what was written: its checksum differs",
                    "quantize the model again",
                )


def sampled_ranges(nbytes: int, num_files: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of a file that go into the fingerprint of its checkpoint."""
    count = max(_SAMPLES_OF_FILE, _SAMPLES // num_files)
    last = max(0, nbytes - _BLOCK_NBYTES)
    starts = [last * sample // (count - 1) for sample in range(count)]
    return [(start, min(start + _BLOCK_NBYTES, nbytes)) for start in starts]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises QuantError when there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise QuantError(
            f"`{path.parent}` has no `{path.name}`", "give the directory of a model"
        ) from error
    except OSError as error:
        raise QuantError(f"cannot read `{path}`: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise QuantError(f"`{path}` is not JSON: {error}", "download it again") from error
    if not isinstance(content, dict):
        raise QuantError(f"`{path}` is not a JSON object", "download it again")
    return content


def _names_by_file(path: Path) -> dict[str, list[str] | None]:
    """File name -> the tensors to take from it (None: all)."""
    if not (path / INDEX_FILE).exists():
        return {SINGLE_FILE: None}
    weight_map = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QuantError(f"`{path / INDEX_FILE}` has no weight_map", "download it again")
    names_by_file: dict[str, list[str] | None] = {}
    for name, file_name in weight_map.items():
        # A name that leads out of the directory must not be followed.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise QuantError(f"`{path / INDEX_FILE}` names the impossible file {file_name!r:.80}")
        names = names_by_file.setdefault(file_name, [])
        assert names is not None, "files of an index have their tensors listed"
        names.append(name)
    return names_by_file


def _require_files(path: Path, names: Collection[str]) -> None:
    """Raise QuantError unless all files of the weights are in the directory."""
    missing = [name for name in sorted(names) if not (path / name).exists()]
    if not missing:
        return
    if missing == [SINGLE_FILE]:
        _refuse_pickles(path)
        raise QuantError(
            f"`{path}` has neither `{SINGLE_FILE}` nor `{INDEX_FILE}`",
            "the weights are missing; download the model again",
        )
    raise QuantError(
        f"`{path}` lacks {len(missing)} of {len(names)} shards: `{missing[0]}`"
        + (" and others" if len(missing) > 1 else ""),
        "the download is incomplete; download the model again",
    )


def _refuse_pickles(path: Path) -> None:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise QuantError(
            f"`{path}` has only pickled weights (`{pickles[0]}`), which may run code when read",
            "use a safetensors version of this model",
        )


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_NBYTES):
                yield block
    except OSError as error:
        raise QuantError(f"cannot read `{path}`: {error.strerror}") from error
