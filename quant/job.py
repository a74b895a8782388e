"""Knows what a conversion is told and what it tells: the job, its progress, its result."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint import Checkpoint
from quant.items import DenseItem, ExpertItem
from quant.manifest import FORMAT_VERSION
from quant.quantize import REVISION
from quant.scheme import QuantScheme
from quant.shards import OutputPlan, plan_output
from quant.supply import AllThere, Supply

SHARD_NBYTES = 5 * 10**9
SOURCE_DIRECTORY = "source"  # in the partial directory: for files of the source on their way


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
    source_form: str  # how its weights are packed, for people; empty for plain floats
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


def job_key(job: ConversionJob) -> str:
    """Hash of all that decides the bytes of the result."""
    content = {
        "format": FORMAT_VERSION,
        "quantizer": REVISION,
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
