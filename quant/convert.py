"""Knows how to turn a checkpoint into a quantized one, unit by unit, so that nothing is lost when
it is killed; knows no model family: the names come with the job.

Everything is written to `<out>.partial`, each unit at its place, in the order in which the source
is read: so its files are needed one after the other, and each only once. After each unit the
journal records its checksum. A resumed conversion hashes what is on disk, keeps what agrees with
the journal and does the rest. The manifest is written when all else is on disk; then the directory
gets its name. The bytes depend on the source and the job alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
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
from quant.shards import OutputPlan, PlacedUnit, Unit, plan_output, reading_order
from quant.supply import AllThere, Supply
from quant.tensor import QuantizedWeight
from quant.workers import Workers

SHARD_NBYTES = 5 * 10**9
SOURCE_DIRECTORY = "source"  # in the partial directory: for files of the source on their way
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
    supply: Supply = AllThere()  # noqa: RUF009 it has no state

    @property
    def partial(self) -> Path:
        """Where the result grows until it is whole."""
        return partial_of(self.out)


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


def plan_of(job: ConversionJob) -> OutputPlan:
    """What will be written; raises QuantError where tensors of the source do not fit."""
    return plan_output(job.source, job.scheme, job.experts, job.dense, job.shard_nbytes)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def convert(job: ConversionJob, progress: ProgressCallback | None = None) -> ConversionResult:
    """Write the quantized checkpoint, or take up what an interrupted run has left.

    Raises QuantError when `out` exists, when `<out>.partial` is of another job or in use, when
    weights are not finite, and when the disk is full or not writable; what was finished stays.
    """
    started = time.monotonic()
    if job.out.exists():
        raise QuantError(f"`{job.out}` exists already", "choose another output, or remove it first")
    plan = plan_of(job)
    for name in job.extra_files:
        if not (job.source.path / name).is_file():
            raise QuantError(f"`{job.source.path}` has no `{name}` to copy")
    with writing(job.partial):
        job.partial.mkdir(parents=True, exist_ok=True)
        directory = os.open(job.partial, os.O_RDONLY)
    try:
        _lock(directory, job.partial)
        with Workers() as workers:
            conversion = _Conversion(job, plan, progress or (lambda _: None), started, workers)
            conversion.run()
        with writing(job.out):
            os.fsync(directory)
            os.rename(job.partial, job.out)
            _sync_directory(job.out.parent)
    finally:
        os.close(directory)
    return conversion.result()


@dataclass
class _Conversion:
    """One run: what is finished, what it was like, and what comes next."""

    job: ConversionJob
    plan: OutputPlan
    progress: ProgressCallback
    started: float
    workers: Workers
    reader: SliceReader = field(init=False)
    writers: dict[int, ShardWriter] = field(default_factory=dict)  # by number of file
    unsynced: set[int] = field(default_factory=set)
    unsynced_nbytes: int = 0
    errors: dict[tuple[int, int], SquaredError] = field(default_factory=dict)  # of finished units
    digests: dict[str, str] = field(default_factory=dict)  # by file name
    running: SquaredError = field(default_factory=SquaredError)  # of experts
    sums: dict[str, SquaredError] = field(default_factory=dict)  # by kind: experts, dense
    done_nbytes: int = 0  # of the source
    resumed_nbytes: int = 0
    units_done: int = 0
    units_resumed: int = 0

    def __post_init__(self) -> None:
        self.reader = SliceReader(self.job.source)
        self.total_nbytes = self.plan.source_nbytes
        self.key = _job_key(self.job)

    def run(self) -> None:
        """Fill the partial directory; afterwards it needs nothing but its name."""
        partial = self.job.partial
        if (partial / MANIFEST_FILE).exists():
            self._take_manifest()  # a run was killed between its last steps
        else:
            _check_is_ours(partial)
            with writing(partial):
                journal = Journal(partial / _JOURNAL_FILE, self.key)
            try:
                self._resume(journal)
                self._check_space()
                self._write_units(journal)
                self._sync(journal)
                for number, shard in enumerate(self.plan.shards):
                    with writing(partial / shard.name):
                        self.digests[shard.name] = self._writer(number).digest_of(0, shard.nbytes)
            finally:
                journal.close()
                for writer in self.writers.values():
                    writer.close()
            self.sums = self._sums()
            self._write_small_files()
        with writing(partial):
            if (partial / SOURCE_DIRECTORY).exists():
                shutil.rmtree(partial / SOURCE_DIRECTORY)
            (partial / _JOURNAL_FILE).unlink(missing_ok=True)

    def result(self) -> ConversionResult:
        return ConversionResult(
            out=self.job.out,
            out_nbytes=sum(file.stat().st_size for file in self.job.out.iterdir()),
            source_nbytes=self.total_nbytes,
            bpw_experts=self.plan.bpw_experts,
            bpw=self.plan.bpw,
            error_experts=self.sums["experts"].relative_rms,
            error_dense=self.sums["dense"].relative_rms,
            units_done=self.units_done,
            units_resumed=self.units_resumed,
            seconds=time.monotonic() - self.started,
        )

    def _take_manifest(self) -> None:
        path = self.job.partial / MANIFEST_FILE
        manifest = Manifest.decode(path, read_json(path))
        if manifest.job != self.key:
            raise other_job(self.job.partial)
        self.sums = {kind: SquaredError(*e) for kind, e in manifest.squared_errors.items()}
        self.units_resumed = len(self.plan.units)

    def _sums(self) -> dict[str, SquaredError]:
        """Added up in the order of the bytes, so that they do not depend on that of the work."""
        sums = {"experts": SquaredError(), "dense": SquaredError()}
        for placed in self.plan.placed:
            kind = "experts" if placed.unit.of_expert else "dense"
            sums[kind] += self.errors[placed.shard, placed.number]
        return sums

    def _check_space(self) -> None:
        """Raise QuantError unless what is still to be written fits the disk."""
        partial = self.job.partial
        needed = self._left_nbytes() + self.job.supply.room_nbytes()
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise QuantError(
                f"`{partial.parent}` has {free / 2**30:.1f} GiB free; "
                f"{needed / 2**30:.1f} GiB are still to be written",
                "make room, or choose an output on another disk",
            )

    def _left_nbytes(self) -> int:
        """Bytes of the result that are not written."""
        done = sum(p.unit.nbytes for p in self.plan.placed if (p.shard, p.number) in self.errors)
        return self.plan.nbytes - done

    def _resume(self, journal: Journal) -> None:
        """Take over the units on record that are still there."""
        records = {(record["shard"], record["unit"]): record for record in journal.records}
        for placed in self.plan.placed:
            record = records.get((placed.shard, placed.number))
            if record is None:
                continue
            end = placed.offset + placed.unit.nbytes
            with writing(self._path(placed)):
                digest = self._writer(placed.shard).digest_of(placed.offset, end)
            if digest == record["digest"]:
                self._account(placed, SquaredError(*record["error"]), resumed=True)

    def _write_units(self, journal: Journal) -> None:
        """Write what is missing, in the order of the source; let go of its files one by one."""
        order = reading_order(self.job.source, self.plan)
        missing = [placed for placed in order if (placed.shard, placed.number) not in self.errors]
        left = Counter(name for name in map(self._file_of, missing) if name is not None)
        supply = self.job.supply
        try:
            supply.begin(self._later_nbytes(missing))
            for placed in missing:
                name = self._file_of(placed)
                if name is None:
                    self._write(placed, journal)
                    continue
                supply.take(name)
                self._write(placed, journal)
                left[name] -= 1
                if not left[name]:
                    self._sync(journal)
                    supply.release(name)
        finally:
            supply.close()

    def _later_nbytes(self, missing: Sequence[PlacedUnit]) -> dict[str, int]:
        """By file of the source, in order: bytes of the result that come of files after it."""
        nbytes: dict[str, int] = defaultdict(int)
        for placed in missing:
            name = self._file_of(placed)
            if name is not None:
                nbytes[name] += placed.unit.nbytes
        total, ends = sum(nbytes.values()), accumulate(nbytes.values())
        return {name: total - end for name, end in zip(nbytes, ends, strict=True)}

    def _write(self, placed: PlacedUnit, journal: Journal) -> None:
        path = self._path(placed)
        with writing(path):
            writer = self._writer(placed.shard)
            writer.begin(placed.offset)
            error = self._write_unit(placed.unit, writer)
            journal.append(
                {
                    "shard": placed.shard,
                    "unit": placed.number,
                    "digest": writer.digest,
                    "error": [error.error, error.total],
                }
            )
        self.unsynced.add(placed.shard)
        self.unsynced_nbytes += placed.unit.nbytes
        if self.unsynced_nbytes >= _SYNC_NBYTES:
            self._sync(journal)
        self._account(placed, error)

    def _sync(self, journal: Journal) -> None:
        """Put finished work beyond the reach of a power failure."""
        for number in sorted(self.unsynced):
            with writing(self.job.partial / self.plan.shards[number].name):
                self.writers[number].sync()
        with writing(journal.path):
            journal.sync()
        self.unsynced.clear()
        self.unsynced_nbytes = 0

    def _writer(self, number: int) -> ShardWriter:
        if number not in self.writers:
            shard = self.plan.shards[number]
            self.writers[number] = ShardWriter(self.job.partial / shard.name, shard.nbytes)
        return self.writers[number]

    def _path(self, placed: PlacedUnit) -> Path:
        return self.job.partial / self.plan.shards[placed.shard].name

    def _file_of(self, placed: PlacedUnit) -> str | None:
        """The file of the source that a unit comes from."""
        part = placed.unit.source
        return None if part is None else self.job.source.info(part.name).file.name

    def _account(self, placed: PlacedUnit, error: SquaredError, resumed: bool = False) -> None:
        """Count a finished unit and tell about it."""
        unit = placed.unit
        self.errors[placed.shard, placed.number] = error
        self.done_nbytes += unit.source_nbytes
        if unit.of_expert:
            self.running += error
        if resumed:
            self.units_resumed += 1
            self.resumed_nbytes += unit.source_nbytes
        else:
            self.units_done += 1
        if unit.source is None:
            return
        elapsed = time.monotonic() - self.started
        fresh = self.done_nbytes - self.resumed_nbytes
        left = self.total_nbytes - self.done_nbytes
        self.progress(
            ConversionProgress(
                done_nbytes=self.done_nbytes,
                total_nbytes=self.total_nbytes,
                item=unit.label,
                error=self.running.relative_rms,
                elapsed_s=elapsed,
                eta_s=elapsed * left / fresh if fresh else None,
            )
        )

    def _write_unit(self, unit: Unit, writer: ShardWriter) -> SquaredError:
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
            squared_errors={kind: (e.error, e.total) for kind, e in self.sums.items()},
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
    names = {file.name for file in partial.iterdir()} - {SOURCE_DIRECTORY}
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
