"""Knows how a model is benchmarked: from cold experts and from warm ones; shows nothing."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moecli.bench_machine import BenchMachine
from moecli.bench_result import BenchResult, BenchRow, Run
from moecli.bench_tests import BenchConfig, BenchTests
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.measuring import with_compute
from moecli.planning import plan_model
from offload.hardware import Machine, peak_rss_nbytes
from offload.plan import MemoryPlan
from quant import ops
from quant.checkpoint import QuantizedCheckpoint

Cancelled = Callable[[], bool]
Progress = Callable[[int, int], None]  # runs done, of how many


@dataclass(frozen=True)
class Subject:
    """The model to measure, and how the product opens and asks it."""

    path: Path
    engine_config: EngineConfig
    open: Callable[[], Engine]
    sampling: Callable[[Engine], SamplingConfig]


def run_bench(
    subject: Subject, config: BenchConfig, cancelled: Cancelled, progress: Progress
) -> BenchResult:
    """Raises MoecliError where the context cannot hold the tests, KeyboardInterrupt when cancelled.

    Both come between runs, or between tokens, so that nothing is left half done.
    """
    count = iter(range(1, config.num_runs + 1))

    def done() -> None:
        if cancelled():
            raise KeyboardInterrupt
        progress(next(count), config.num_runs)

    cold: dict[str, list[Run]] = {}
    dropped, before = config.cold > 0, []
    for test in ("prompt", "answer") * config.cold:
        dropped &= drop_page_cache(subject.path)
        with subject.open() as engine:
            before.append(engine.rss_before)
            tests, _ = _tests(subject, engine, config, cancelled)
            name, run = tests.prompt() if test == "prompt" else tests.answer()
        cold.setdefault(name, []).append(run)
        done()
    with subject.open() as engine:
        before.append(engine.rss_before)
        tests, machine = _tests(subject, engine, config, cancelled)
        warm = _warm_runs(tests, config, done)
        rates = machine.typical()
        return BenchResult(
            model=subject.path.name,
            device=str(engine.decoder.device),
            threads=torch.get_num_threads(),
            kernels=_kernels(subject.engine_config.kernels, engine),
            ram_bw=rates.ram_bw,
            disk_bw=rates.disk_bw,
            link_bw=rates.link_bw,
            vram_bw=rates.vram_bw,
            peak_rss_nbytes=peak_rss_nbytes(),
            peak_vram_nbytes=tests.peak_vram_nbytes,
            grown_rss_nbytes=peak_rss_nbytes() - before[0],
            page_cache_dropped=dropped,
            rows=_rows("cold", cold) + _rows("warm", warm),
            plan=_predicted(engine, subject.engine_config, rates),
        )


def _tests(
    subject: Subject, engine: Engine, config: BenchConfig, cancelled: Cancelled
) -> tuple[BenchTests, BenchMachine]:
    machine = BenchMachine(subject.path, engine.plan.on_device, torch.get_num_threads())
    sampling = subject.sampling(engine)
    return BenchTests(engine, config, sampling, machine.now, cancelled), machine


def _warm_runs(
    tests: BenchTests, config: BenchConfig, done: Callable[[], None]
) -> dict[str, list[Run]]:
    """All tests in turn, again and again: a disturbance does not meet one of them alone."""
    found: dict[str, list[Run]] = {}
    for repeat in range(1 + config.repeats):
        for name, run in tests.all_tests():
            if repeat:  # the first brings experts to their places and kernels into being
                found.setdefault(name, []).append(run)
            done()
    return found


def _rows(slots: str, found: dict[str, list[Run]]) -> tuple[BenchRow, ...]:
    return tuple(BenchRow(test, slots, tuple(runs)) for test, runs in found.items())


def drop_page_cache(path: Path) -> bool:
    """Ask the system to forget the files in a directory; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in (file for file in path.iterdir() if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not on disk yet cannot be forgotten
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _kernels(name: str, engine: Engine) -> str:
    """Which compute, where "auto" has chosen; those in C++ by their instruction set too."""
    if name == "auto":
        slow = ops.fallback() is not None
        name = "triton" if engine.decoder.device.type == "cuda" else "torch" if slow else "cpu"
    return f"cpu {ops.cpu_isa()}" if name == "cpu" else name


def _predicted(engine: Engine, config: EngineConfig, machine: Machine) -> MemoryPlan:
    """The engine's plan; on the processor made again with bandwidths that are all known."""
    if engine.plan.on_device:
        return engine.plan
    checkpoint = QuantizedCheckpoint.open(engine.path)
    schemes = (checkpoint.scheme, checkpoint.dense_scheme)
    same_budget = replace(config, ram_nbytes=engine.plan.ram_budget, device="cpu")
    before = replace(machine, ram_available=engine.plan.ram_available)
    known = with_compute(before, checkpoint.layout, engine.spec.experts_per_token)
    return plan_model(engine.spec, schemes, engine.ctx, same_budget, known)
