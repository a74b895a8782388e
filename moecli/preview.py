"""Knows what a conversion will take before it begins: sizes from shapes, times from short tries."""

import hashlib
import shutil
import time
import zlib
from dataclasses import dataclass

import torch

from quant.job import ConversionJob, plan_of
from quant.quantize import quantize_measured
from quant.safetensors_file import memory_of
from quant.schedule import files_of, turns_of
from quant.workers import Workers

_SAMPLE_SHAPE = (512, 4096)  # a block of a conversion
_BLOCKS = 4  # a thread
_WEIGHT_NBYTES = 2  # of a source in bf16


@dataclass(frozen=True)
class Preview:
    """Sizes in bytes, times in seconds, rates in bytes a second of the source in 16 bits."""

    out: str
    source_nbytes: int
    source_form: str  # how its weights are packed, for people; empty for plain floats
    download_nbytes: int
    out_nbytes: int
    peak_disk_nbytes: int
    free_disk_nbytes: int
    bpw_experts: float
    bpw: float
    quantize_rate: float
    network_rate: float | None  # None where nothing is to be downloaded
    quantizing_s: float
    seconds: float

    @property
    def bottleneck(self) -> str:
        return "the network" if self.seconds > self.quantizing_s else "quantizing"


def preview(job: ConversionJob, stated_rate: float | None) -> Preview:
    """What `convert(job)` will do from its beginning. The network is measured where no rate is
    stated; download and quantization go on at the same time, so the slower one counts.
    """
    plan, supply = plan_of(job), job.supply
    turns = files_of(turns_of(job.source, plan.placed))
    download, room = supply.download_nbytes(), supply.room_nbytes(turns)
    rate = None
    if download:
        rate = supply.measure_rate() if stated_rate is None else stated_rate
    quantize_rate = _quantize_rate(job)
    quantizing_s = plan.num_weights * _WEIGHT_NBYTES / quantize_rate
    existing = job.out.parent
    while not existing.exists():
        existing = existing.parent
    return Preview(
        out=str(job.out),
        source_nbytes=plan.source_nbytes,
        source_form=job.source.form,
        download_nbytes=download,
        out_nbytes=plan.nbytes,
        peak_disk_nbytes=plan.nbytes + room,
        free_disk_nbytes=shutil.disk_usage(existing).free,
        bpw_experts=plan.bpw_experts,
        bpw=plan.bpw,
        quantize_rate=quantize_rate,
        network_rate=rate,
        quantizing_s=quantizing_s,
        seconds=max(quantizing_s, download / rate if rate else 0.0),
    )


def _quantize_rate(job: ConversionJob) -> float:
    """Of the experts, which are nearly all: random weights are quantized and hashed as a conversion
    does it. The disk is not asked.
    """
    weights = torch.randn(_SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Workers() as workers:
        blocks = [weights] * (_BLOCKS * workers.count)
        quantize_measured(weights[:64], job.scheme)
        started = time.perf_counter()
        for quantized, _ in workers.map(lambda b: quantize_measured(b, job.scheme), blocks):
            zlib.crc32(memory_of(quantized.packed))  # of the unit
            hashlib.sha256(memory_of(quantized.packed))  # of its file
        seconds = time.perf_counter() - started
    return len(blocks) * weights.numel() * _WEIGHT_NBYTES / seconds
