"""Knows how to turn a checkpoint into a quantized one, unit by unit, so that nothing is lost when
it is killed; knows no model family: the names come with the job.

Everything is written to `<out>.partial`, each unit at its place, in the order in which the source
is read: so its files are needed one after the other, and each only once. After each unit the
journal records its checksum. A resumed conversion hashes what is on disk, keeps what agrees with
the journal and does the rest. The manifest is written when all else is on disk; then the directory
gets its name. The bytes depend on the source and the job alone.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quant.checkpoint import read_json
from quant.errors import QuantError
from quant.file_digests import FileDigests
from quant.items import SliceReader
from quant.job import (
    SOURCE_DIRECTORY,
    ConversionJob,
    ConversionProgress,
    ConversionResult,
    ProgressCallback,
    job_key,
    plan_of,
)
from quant.journal import Journal, other_job
from quant.manifest import MANIFEST_FILE, FileRecord, Manifest
from quant.quantize import SquaredError
from quant.schedule import Turn, files_of, turns_of
from quant.shard_writer import ShardWriter, writing
from quant.shards import OutputPlan, PlacedUnit
from quant.small_files import sync_directory, write_small_files
from quant.syncing import Syncing
from quant.unit_writer import UnitWriter, WrittenUnit
from quant.workers import Workers

_JOURNAL_FILE = "journal"


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
            sync_directory(job.out.parent)
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
    units: UnitWriter = field(init=False)
    writers: dict[int, ShardWriter] = field(default_factory=dict)  # by number of file
    errors: dict[tuple[int, int], SquaredError] = field(default_factory=dict)  # of finished units
    digests: FileDigests = field(default_factory=FileDigests)
    files: dict[str, FileRecord] = field(default_factory=dict)  # with tensors
    running: SquaredError = field(default_factory=SquaredError)  # of experts
    sums: dict[str, SquaredError] = field(default_factory=dict)  # by kind: experts, dense
    done_nbytes: int = 0  # of the source
    resumed_nbytes: int = 0
    units_done: int = 0
    units_resumed: int = 0

    def __post_init__(self) -> None:
        self.units = UnitWriter(SliceReader(self.job.source), self.workers)
        self.total_nbytes = self.plan.source_nbytes
        self.key = job_key(self.job)

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
                with self.digests:
                    self._resume(journal)
                    turns = turns_of(self.job.source, self._missing())
                    self._check_space(turns)
                    with Syncing(journal) as syncing:
                        self._write_units(turns, journal, syncing)
                        syncing.begin()
                        self.files = self._file_records()
                        syncing.wait()
            finally:
                journal.close()
                for writer in self.writers.values():
                    writer.close()
            self.sums = self._sums()
            write_small_files(self.job, self.plan, self._manifest())
        with writing(partial):
            if (partial / SOURCE_DIRECTORY).exists():
                shutil.rmtree(partial / SOURCE_DIRECTORY)
            (partial / _JOURNAL_FILE).unlink(missing_ok=True)

    def result(self) -> ConversionResult:
        return ConversionResult(
            out=self.job.out,
            out_nbytes=sum(file.stat().st_size for file in self.job.out.iterdir()),
            source_nbytes=self.total_nbytes,
            source_form=self.job.source.form,
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

    def _check_space(self, turns: Sequence[Turn]) -> None:
        """Raise QuantError unless what is still to be written fits the disk."""
        partial = self.job.partial
        needed = self._left_nbytes() + self.job.supply.room_nbytes(files_of(turns))
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise QuantError(
                f"`{partial.parent}` has {free / 2**30:.1f} GiB free; "
                f"{needed / 2**30:.1f} GiB are still to be written",
                "make room, or choose an output on another disk",
            )

    def _left_nbytes(self) -> int:
        """Bytes of the result that are not written."""
        return sum(placed.unit.nbytes for placed in self._missing())

    def _resume(self, journal: Journal) -> None:
        """Take over the units on record that are still there."""
        records = {(record["shard"], record["unit"]): record for record in journal.records}
        for placed in self.plan.placed:
            record = records.get((placed.shard, placed.number))
            if record is None:
                continue
            end = placed.offset + placed.unit.nbytes
            with writing(self._path(placed)):
                checksum = self._writer(placed.shard).checksum_of(placed.offset, end)
            if checksum == record["crc32"]:
                self._account(placed, SquaredError(*record["error"]), resumed=True)

    def _file_records(self) -> dict[str, FileRecord]:
        """Of all files when they are complete."""
        return {
            shard.name: FileRecord(shard.nbytes, self.digests.take(number))
            for number, shard in enumerate(self.plan.shards)
        }

    def _missing(self) -> list[PlacedUnit]:
        return [p for p in self.plan.placed if (p.shard, p.number) not in self.errors]

    def _write_units(self, turns: Sequence[Turn], journal: Journal, syncing: Syncing) -> None:
        """Write what is missing, in the order of the source; let go of its files one by one."""
        supply = self.job.supply
        try:
            supply.begin(files_of(turns))
            for turn in turns:
                if turn.file is not None:
                    supply.take(turn.file.name)
                for written in self.units.write(turn.units, self._writer):
                    self._note(written, journal)
                    syncing.add(self._writer(written.placed.shard), written.placed.unit.nbytes)
                if turn.released and supply.takes_away:
                    syncing.begin()
                    syncing.wait()
                for name in turn.released:
                    supply.release(name)
        finally:
            supply.close()

    def _note(self, written: WrittenUnit, journal: Journal) -> None:
        """Put a finished unit on record."""
        placed = written.placed
        with writing(journal.path):
            journal.append(
                {
                    "shard": placed.shard,
                    "unit": placed.number,
                    "crc32": written.checksum,
                    "error": [written.error.error, written.error.total],
                }
            )
        self._account(placed, written.error)

    def _writer(self, number: int) -> ShardWriter:
        if number not in self.writers:
            shard = self.plan.shards[number]
            path = self.job.partial / shard.name
            with writing(path):
                self.writers[number] = ShardWriter(path, shard.nbytes)
        return self.writers[number]

    def _path(self, placed: PlacedUnit) -> Path:
        return self.job.partial / self.plan.shards[placed.shard].name

    def _account(self, placed: PlacedUnit, error: SquaredError, resumed: bool = False) -> None:
        """Count a finished unit and tell about it."""
        unit = placed.unit
        self.errors[placed.shard, placed.number] = error
        self.digests.add(self._writer(placed.shard), placed)
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

    def _manifest(self) -> Manifest:
        return Manifest(
            job=self.key,
            source=self.job.source.fingerprint,
            layout=self.plan.layout,
            dense_scheme=self.job.dense_scheme,
            squared_errors={kind: (e.error, e.total) for kind, e in self.sums.items()},
            files=self.files,
            experts={layer: tuple(table) for layer, table in self.plan.experts.items()},
        )


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
