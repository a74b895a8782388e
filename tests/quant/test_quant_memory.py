"""What a conversion holds in memory, of a checkpoint many times larger than that."""

import json
import os
from pathlib import Path

import pytest
import torch
from quant_sources import make_job, random_weights, write_source
from test_quant_failures import peak_rss, reset_peak

from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.items import ExpertItem, TensorSlice
from quant.job import ConversionJob
from quant.safetensors_file import build_header
from quant.scheme import QuantScheme

# Of the 2 GiB and one expert that are promised, a part that a test has time for.
BOUND_NBYTES = 40 << 20
TIMES = 20
HIDDEN, INTERMEDIATE = 1024, 2304
EXPERT_NBYTES = 3 * HIDDEN * INTERMEDIATE * 2
NUM_EXPERTS = -(-TIMES * (BOUND_NBYTES + EXPERT_NBYTES) // EXPERT_NBYTES)


def sparse_source(path: Path, fused: bool) -> Checkpoint:
    """Experts of zeros, which take no room on the disk, in one file."""
    shapes: dict[str, tuple[int, ...]] = {}
    if fused:
        shapes["experts.gate_up_proj"] = (NUM_EXPERTS, HIDDEN, 2 * INTERMEDIATE)
        shapes["experts.down_proj"] = (NUM_EXPERTS, INTERMEDIATE, HIDDEN)
    else:
        for expert in range(NUM_EXPERTS):
            for part in ("gate", "up"):
                shapes[f"experts.{expert}.{part}_proj.weight"] = (INTERMEDIATE, HIDDEN)
            shapes[f"experts.{expert}.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "test"}))
    header, entries = build_header((name, torch.bfloat16, shape) for name, shape in shapes.items())
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(entry.offset + entry.nbytes for entry in entries.values()))
    return Checkpoint.open(path)


def job_of(source: Checkpoint, out: Path, fused: bool) -> ConversionJob:
    def item(expert: int) -> ExpertItem:
        prefix = f"experts.{expert}"
        if fused:
            both = "experts.gate_up_proj"
            parts = (
                TensorSlice(both, expert, True, (0, INTERMEDIATE)),
                TensorSlice(both, expert, True, (INTERMEDIATE, 2 * INTERMEDIATE)),
                TensorSlice("experts.down_proj", expert, True),
            )
        else:
            names = (f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down"))
            parts = tuple(map(TensorSlice, names))
        return ExpertItem(0, expert, prefix, *parts)

    experts = tuple(map(item, range(NUM_EXPERTS)))
    return ConversionJob(source, out, QuantScheme(4, 32), None, experts, (), {})


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_a_checkpoint_twenty_times_larger_than_the_bound(tmp_path: Path, fused: bool) -> None:
    source = sparse_source(tmp_path / "source", fused)
    nbytes = (source.path / "model.safetensors").stat().st_size
    bound = BOUND_NBYTES + EXPERT_NBYTES
    assert nbytes >= TIMES * bound
    job = job_of(source, tmp_path / "out", fused)
    tiny = write_source(tmp_path / "tiny", random_weights(True))
    warm_up = make_job(tiny, tmp_path / "tiny-out", True)
    child = os.fork()
    if child == 0:
        status = 255
        try:
            convert(warm_up)  # what every conversion needs is not counted
            reset_peak()
            before = peak_rss()
            convert(job)
            status = min(254, (peak_rss() - before) >> 20)
        finally:
            os._exit(status)
    grown = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) << 20
    result = sum(file.stat().st_size for file in job.out.iterdir())
    assert result > nbytes / 4, "all was converted"
    assert grown <= bound, f"{grown >> 20} MiB of {bound >> 20}, for {nbytes >> 20} MiB"
