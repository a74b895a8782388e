"""Knows how to turn a checkpoint into a quantized one, unit by unit, so that nothing is lost when
it is killed; knows no model family: the names come with the job.

Everything is written to `<out>.partial`, front to back. After each unit the journal records the
file's length and checksum up to there. A resumed conversion hashes what is on disk, keeps what
agrees with the journal and goes on behind it. The manifest is written when all else is on disk;
then the directory gets its name. The bytes depend on the source and the job alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint, read_json
from quant.errors import QuantError
from quant.items import DenseItem, ExpertItem, SliceReader, TensorSlice
from quant.journal import Journal, other_job
from quant.manifest import FORMAT_VERSION, MANIFEST_FILE, FileRecord, Manifest
from quant.quantize import SquaredError, quantize_measured
from quant.safetensors_file import memory_of, write_fully
from quant.scheme import QuantScheme
from quant.shard_writer import ShardWriter, writing
from quant.shards import OutputPlan, Shard, Unit, plan_output

SHARD_NBYTES = 5 * 10**9
_JOURNAL_FILE = "journal"
# At most this much finished work is written again after a power failure; a kill loses none.
_SYNC_NBYTES = 256 << 20


@dataclass(frozen=True)
class ConversionJob:
    """What is to become of a checkpoint. `config` is written as it is."""

    source: Checkpoint
    out: Path
    scheme: QuantScheme
    dense_scheme: QuantScheme | None
    experts: tuple[ExpertItem, ...]
    dense: tuple[DenseItem, ...]
    config: dict[str, Any]
    extra_files: tuple[str, ...] = ()  # copied from the source's directory
    shard_nbytes: int = SHARD_NBYTES

    @property
    def partial(self) -> Path:
        """Where the result grows until it is whole."""
        return self.out.with_name(self.out.name + ".partial")


@dataclass(frozen=True)
class ConversionProgress:
    """Bytes are those of the source; `error` is the running relative rms error of experts."""

    done_nbytes: int
    total_nbytes: int
    item: str  # what was just finished
    error: float
    elapsed_s: float
    eta_s: float | None  # None until this run has finished something


@dataclass(frozen=True)
class ConversionResult:
    """Sizes in bytes; errors are relative rms errors of the weights that were quantized."""

    out: Path
    out_nbytes: int
    source_nbytes: int
    bpw_experts: float
    bpw: float  # of all weights, those kept in 16 bits included
    error_experts: float
    error_dense: float
    units_done: int  # by this run
    units_resumed: int  # found finished from an earlier one
    seconds: float  # of this run


ProgressCallback = Callable[[ConversionProgress], None]


def convert(job: ConversionJob, progress: ProgressCallback | None = None) -> ConversionResult:
    """Write the quantized checkpoint, or take up what an interrupted run has left.

    Raises QuantError when `out` exists, when `<out>.partial` is of another job or in use, when
    weights are not finite, and when the disk is full or not writable; what was finished stays.
    """
    started = time.monotonic()
    if job.out.exists():
        raise QuantError(f"`{job.out}` exists already", "choose another output, or remove it first")
    plan = plan_output(job.source, job.scheme, job.experts, job.dense, job.shard_nbytes)
    for name in job.extra_files:
        if not (job.source.path / name).is_file():
            raise QuantError(f"`{job.source.path}` has no `{name}` to copy")
    with writing(job.partial):
        job.partial.mkdir(parents=True, exist_ok=True)
        directory = os.open(job.partial, os.O_RDONLY)
    try:
        _lock(directory, job.partial)
        conversion = _Conversion(job, plan, progress or (lambda _: None), started)
        conversion.run()
        with writing(job.out):
            os.fsync(directory)
            os.rename(job.partial, job.out)
            _sync_directory(job.out.parent)
    finally:
        os.close(directory)
    return conversion.result()


def quantization_config(
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    ignore: Sequence[str],
    expert_targets: Sequence[str] = (r"re:.*\.experts\..*_proj$",),
) -> dict[str, Any]:
    """The `quantization_config` of config.json: compressed-tensors, `pack-quantized`.

    Readers match a Linear's name before its class, so the experts' group goes by name and the
    dense group takes the other Linears. `ignore` names the Linears that stay in 16 bits.
    """
    if dense_scheme == scheme:
        targets = [(scheme, ["Linear"])]
    else:
        targets = [(scheme, list(expert_targets))]
        if dense_scheme is not None:
            targets.append((dense_scheme, ["Linear"]))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            f"group_{number}": _config_group(group_scheme, group_targets)
            for number, (group_scheme, group_targets) in enumerate(targets)
        },
    }


def _config_group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        },
    }


@dataclass
class _Conversion:
    """One run: what is finished, what it was like, and what comes next."""

    job: ConversionJob
    plan: OutputPlan
    progress: ProgressCallback
    started: float
    reader: SliceReader = field(init=False)
    errors: dict[str, SquaredError] = field(init=False)  # by kind: experts, dense
    digests: dict[str, str] = field(default_factory=dict)  # by file name
    done_nbytes: int = 0  # of the source
    resumed_nbytes: int = 0
    units_done: int = 0
    units_resumed: int = 0
    unsynced_nbytes: int = 0

    def __post_init__(self) -> None:
        self.reader = SliceReader(self.job.source)
        self.errors = {"experts": SquaredError(), "dense": SquaredError()}
        self.total_nbytes = sum(unit.source_nbytes for unit in self.plan.units)
        self.key = _job_key(self.job)

    def run(self) -> None:
        """Fill the partial directory; afterwards it needs nothing but its name."""
        partial = self.job.partial
        if (partial / MANIFEST_FILE).exists():
            self._take_manifest()  # a run was killed between its last two steps
        else:
            _check_is_ours(partial)
            self._check_space()
            with writing(partial):
                journal = Journal(partial / _JOURNAL_FILE, self.key)
            try:
                for number, shard in enumerate(self.plan.shards):
                    self._write_shard(number, shard, journal)
            finally:
                journal.close()
            self._write_small_files()
        with writing(partial):
            (partial / _JOURNAL_FILE).unlink(missing_ok=True)

    def result(self) -> ConversionResult:
        layout, units = self.plan.layout, self.plan.units
        nbytes = sum(t.nbytes for u in units for t in u.tensors if u.item is not None)
        num_weights = sum(unit.num_weights for unit in units)
        return ConversionResult(
            out=self.job.out,
            out_nbytes=sum(file.stat().st_size for file in self.job.out.iterdir()),
            source_nbytes=self.total_nbytes,
            bpw_experts=layout.nbytes * 8 / layout.num_weights,
            bpw=nbytes * 8 / num_weights,
            error_experts=self.errors["experts"].relative_rms,
            error_dense=self.errors["dense"].relative_rms,
            units_done=self.units_done,
            units_resumed=self.units_resumed,
            seconds=time.monotonic() - self.started,
        )

    def _take_manifest(self) -> None:
        path = self.job.partial / MANIFEST_FILE
        manifest = Manifest.decode(path, read_json(path))
        if manifest.job != self.key:
            raise other_job(self.job.partial)
        self.errors = {kind: SquaredError(*e) for kind, e in manifest.squared_errors.items()}
        self.units_resumed = len(self.plan.units)

    def _check_space(self) -> None:
        """Raise QuantError unless what is still to be written fits the disk."""
        partial = self.job.partial
        there = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        needed = self.plan.nbytes - there
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise QuantError(
                f"`{partial.parent}` has {free / 2**30:.1f} GiB free; "
                f"{needed / 2**30:.1f} GiB are still to be written",
                "make room, or choose an output on another disk",
            )

    def _write_shard(self, number: int, shard: Shard, journal: Journal) -> None:
        path = self.job.partial / shard.name
        with writing(path):
            writer = ShardWriter(path)
        try:
            with writing(path):
                first = self._resume_shard(number, shard, journal, writer)
            for unit_number in range(first, len(shard.units)):
                unit = shard.units[unit_number]
                with writing(path):
                    error = self._write_unit(unit, writer)
                    journal.append(
                        {
                            "shard": number,
                            "unit": unit_number,
                            "end": writer.position,
                            "digest": writer.digest,
                            "error": [error.error, error.total],
                        }
                    )
                    self._sync_now_and_then(unit.nbytes, writer, journal)
                self._account(unit, error)
            with writing(path):
                writer.sync()
                journal.sync()
            assert writer.position == shard.nbytes, f"`{path}` has {writer.position} bytes"
            self.digests[shard.name] = writer.digest
        finally:
            writer.close()

    def _resume_shard(
        self, number: int, shard: Shard, journal: Journal, writer: ShardWriter
    ) -> int:
        """Take over the finished units of a shard that are still there; returns their count."""
        latest = {r["unit"]: r for r in journal.records if r["shard"] == number}
        records: list[dict[str, Any]] = []
        while len(records) in latest:
            records.append(latest[len(records)])
        held = writer.resume([(record["end"], record["digest"]) for record in records])
        for unit, record in zip(shard.units[:held], records, strict=False):
            self._account(unit, SquaredError(*record["error"]), resumed=True)
        return held

    def _account(self, unit: Unit, error: SquaredError, resumed: bool = False) -> None:
        """Count a finished unit and tell about it."""
        self.done_nbytes += unit.source_nbytes
        kind = "experts" if isinstance(unit.item, ExpertItem) else "dense"
        self.errors[kind] += error
        if resumed:
            self.units_resumed += 1
            self.resumed_nbytes += unit.source_nbytes
        else:
            self.units_done += 1
        if unit.item is None:
            return
        elapsed = time.monotonic() - self.started
        fresh = self.done_nbytes - self.resumed_nbytes
        left = self.total_nbytes - self.done_nbytes
        self.progress(
            ConversionProgress(
                done_nbytes=self.done_nbytes,
                total_nbytes=self.total_nbytes,
                item=unit.label,
                error=self.errors["experts"].relative_rms,
                elapsed_s=elapsed,
                eta_s=elapsed * left / fresh if fresh else None,
            )
        )

    def _sync_now_and_then(self, nbytes: int, writer: ShardWriter, journal: Journal) -> None:
        self.unsynced_nbytes += nbytes
        if self.unsynced_nbytes >= _SYNC_NBYTES:
            writer.sync()
            journal.sync()
            self.unsynced_nbytes = 0

    def _write_unit(self, unit: Unit, writer: ShardWriter) -> SquaredError:
        error = SquaredError()
        if unit.item is None:
            writer.write(unit.constant)
        elif isinstance(unit.item, ExpertItem):
            for part in unit.item.projections.values():
                error += self._write_linear(part, self.job.scheme, writer)
        elif unit.item.scheme is not None:
            error += self._write_linear(unit.item.source, unit.item.scheme, writer)
        else:
            self._write_kept(unit.item.source, unit.tensors[0].dtype, writer)
        return error

    def _write_linear(
        self, part: TensorSlice, scheme: QuantScheme, writer: ShardWriter
    ) -> SquaredError:
        """Packed words, block by block, then all scales."""
        scales: list[Tensor] = []
        error = SquaredError()
        for block in self.reader.blocks(part):
            try:
                weight, block_error = quantize_measured(block, scheme)
            except QuantError as failure:
                raise QuantError(f"`{part.name}`: {failure.message}", failure.hint) from failure
            writer.write(memory_of(weight.packed))
            scales.append(weight.scale)
            error += block_error
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

    def _write_small_files(self) -> None:
        """What is no tensor; the manifest last, under its name only when all else is on disk."""
        partial, source = self.job.partial, self.job.source.path
        contents = {CONFIG_FILE: _json_bytes(self.job.config)}
        if len(self.plan.shards) > 1:
            contents[INDEX_FILE] = _json_bytes(_index(self.plan))
        for name in self.job.extra_files:
            contents[name] = (source / name).read_bytes()
        files = {
            shard.name: FileRecord(shard.nbytes, self.digests[shard.name])
            for shard in self.plan.shards
        }
        for name, content in contents.items():
            files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
            _write_file(partial / name, content)
        temporary = partial / f"{MANIFEST_FILE}.tmp"
        _write_file(temporary, self._manifest(files).encode())
        with writing(partial):
            _sync_directory(partial)
            os.replace(temporary, partial / MANIFEST_FILE)
            _sync_directory(partial)

    def _manifest(self, files: dict[str, FileRecord]) -> Manifest:
        return Manifest(
            job=self.key,
            source=self.job.source.fingerprint,
            layout=self.plan.layout,
            dense_scheme=self.job.dense_scheme,
            squared_errors={kind: (e.error, e.total) for kind, e in self.errors.items()},
            files=files,
            experts={layer: tuple(table) for layer, table in self.plan.experts.items()},
        )


def _job_key(job: ConversionJob) -> str:
    """Hash of all that decides the bytes of the result."""
    content = {
        "format": FORMAT_VERSION,
        "source": job.source.fingerprint,
        "scheme": asdict(job.scheme),
        "dense_scheme": None if job.dense_scheme is None else asdict(job.dense_scheme),
        "experts": [asdict(item) for item in job.experts],
        "dense": [asdict(item) for item in job.dense],
        "config": job.config,
        "extra_files": {
            name: hashlib.sha256((job.source.path / name).read_bytes()).hexdigest()
            for name in job.extra_files
        },
        "shard_nbytes": job.shard_nbytes,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _index(plan: OutputPlan) -> dict[str, Any]:
    weight_map = {name: shard.name for shard in plan.shards for name in shard.entries}
    total = sum(entry.nbytes for shard in plan.shards for entry in shard.entries.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _check_is_ours(partial: Path) -> None:
    """Raise QuantError when a directory of the user's bears the name of ours."""
    names = {file.name for file in partial.iterdir()}
    if names and _JOURNAL_FILE not in names:
        raise QuantError(
            f"`{partial}` exists and is not an unfinished conversion",
            "remove it, or choose another output",
        )


def _lock(directory: int, partial: Path) -> None:
    """Hold the directory until its descriptor is closed, at the latest when the process dies."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise QuantError(
            f"another conversion is writing `{partial}`", "wait until it is done"
        ) from error


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_fully(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
