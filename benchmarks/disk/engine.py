"""Measures what a run of the engine gets of the disk: answers and prompts, as `moecli bench` does.

Nothing is replaced: the router chooses, experts are computed, guesses are those of the decoder. The
weights are random, so that a guess about the next layer is right as often as the row says.
"""

import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.disk.ceiling import DEPTHS, Ceiling, named
from benchmarks.disk.watch import Watch, read_nbytes
from moecli.bench_tests import BenchConfig, BenchTests
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from offload.disk import ExpertSpan
from offload.hardware import Machine, detect, peak_rss_nbytes
from offload.host import HostArena
from quant.checkpoint import QuantizedCheckpoint

SHARE = 1 / 3  # of the experts that the RAM budget holds
CTX = 1024
CEILING_NBYTES = 1 << 30  # of the arena that the ceiling reads into


@dataclass(frozen=True)
class Sample:
    """One test: what came from the disk, in what time."""

    gb_s: float
    idle: float  # share of the time in which nothing was being read
    hit_rate: float  # guesses that came in time included
    guesses_used: float  # of the experts that were read ahead
    used: float  # of the bytes read, those that were asked for
    tok_s: float


class Subject:
    """An open engine whose budget holds a share of the experts, on a machine that has no more."""

    def __init__(self, path: Path, threads: int | None, most_bw: float | None) -> None:
        whole = _open(path, threads, None)
        plan = whole.plan
        whole.close()
        missing = plan.host_slots - int(SHARE * plan.total_experts)
        before = _peak_from_here()
        self.engine = _open(path, threads, plan.ram_nbytes - missing * plan.slot_nbytes)
        self._before = before
        self._watch, self._seeds = Watch(most_bw), random.Random(0)

    def peak_nbytes(self) -> int:
        """How much the process has grown at most since the engine was opened."""
        return peak_rss_nbytes() - self._before

    def sample(self, prompt: int, new: int) -> Sample:
        """Of a prompt that begins with no context, or of an answer to one token."""
        config = BenchConfig(prompt_tokens=prompt, new_tokens=new)
        seed = self._seeds.randrange(1 << 31)
        tests = BenchTests(self.engine, config, SamplingConfig(), Machine, lambda: False, seed)
        stats, nbytes = self.engine.expert_stats(), read_nbytes()
        with self._watch.on():
            begin = time.perf_counter()
            _ = tests.answer() if prompt == 1 else tests.prompt()
            end = time.perf_counter()
        seconds, nbytes = end - begin, read_nbytes() - nbytes
        found = self.engine.expert_stats() - stats
        assert nbytes >= 0.99 * found.disk_nbytes, "the page cache has answered"
        assert found.hit_rate is not None
        wrong = found.prefetch_reads - found.prefetch_hits
        return Sample(
            gb_s=nbytes / seconds / 1e9,
            idle=self._watch.idle_seconds(begin, end) / seconds,
            hit_rate=found.hit_rate,
            guesses_used=found.prefetch_hits / max(1, found.prefetch_reads),
            used=1 - wrong * self.engine.plan.expert_nbytes / found.disk_nbytes,
            tok_s=(prompt if prompt > 1 else new) / seconds,
        )


def _open(path: Path, threads: int | None, ram_nbytes: int | None) -> Engine:
    """The machine is said to have no more memory: with more, the plan would use the page cache."""
    config = EngineConfig(ctx=CTX, ram_nbytes=ram_nbytes, device="cpu", threads=threads)
    found = detect(path)
    machine = replace(found, ram_available=ram_nbytes or found.ram_available)
    with patch("moecli.engine.detect", lambda *_: machine):
        return Engine.open(path, config)


def _peak_from_here() -> int:
    """Bytes of the process now, from which its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_nbytes()


@dataclass(frozen=True)
class Settings:
    """How a model is measured."""

    rounds: int
    threads: int | None  # of the engine; None: one a physical core
    most_bw: float | None  # bytes a second of a slower disk; None: this machine's as it is
    prompts: tuple[int, ...]
    new_tokens: int


def measure(name: str, path: Path, settings: Settings) -> dict[str, Any]:
    """Of each test the medians, and shares of what the ceiling was in the same round.

    The ceiling is the slower disk's where that of this machine is faster.
    """
    subject = Subject(path, settings.threads, settings.most_bw)
    engine = subject.engine
    tests = {f"prompt of {count}": (count, 1) for count in settings.prompts}
    tests[f"answer of {settings.new_tokens}"] = (1, settings.new_tokens)
    for lengths in tests.values():  # brings experts to their slots and kernels into being
        subject.sample(*lengths)
    peak = subject.peak_nbytes()  # before the ceiling takes memory of its own
    ceiling, arena = _ceiling(path)
    ceilings: list[dict[tuple[int, int], float]] = []
    samples: dict[str, list[Sample]] = {test: [] for test in tests}
    for number in range(1, settings.rounds + 1):
        ceilings.append({way: ceiling.measure(way, number) for way in ceiling.ways})
        for test in random.Random(number).sample(list(tests), len(tests)):
            samples[test].append(subject.sample(*tests[test]))
    ceiling.close()
    arena.close()
    plan = engine.plan
    engine.close()
    medians = {way: statistics.median(c[way] for c in ceilings) for way in ceiling.ways}
    best = max(medians, key=lambda way: medians[way])
    most = settings.most_bw or float("inf")
    limits = [min(c[best], most) / 1e9 for c in ceilings]
    return {
        "model": name,
        "most_bw": settings.most_bw,
        "rounds": settings.rounds,
        "expert_nbytes": plan.expert_nbytes,
        "experts": plan.total_experts,
        "slots": plan.host_slots,
        "planned_nbytes": plan.ram_nbytes,
        "peak_nbytes": peak,
        "ceiling_gb_s": named(medians),
        "rows": [_row(test, found, limits) for test, found in samples.items()],
    }


def _ceiling(path: Path) -> tuple[Ceiling, HostArena]:
    checkpoint = QuantizedCheckpoint.open(path)
    spans = {
        (layer, expert): ExpertSpan(*checkpoint.expert_span(layer, expert))
        for layer in checkpoint.layers
        for expert in range(checkpoint.num_experts(layer))
    }
    slot_nbytes = checkpoint.layout.slot_nbytes
    slots = min(max(DEPTHS), CEILING_NBYTES // slot_nbytes)
    arena = HostArena(slots * slot_nbytes, slot_nbytes)
    return Ceiling(spans, arena), arena


def _row(test: str, found: list[Sample], ceilings: list[float]) -> dict[str, Any]:
    shares = [sample.gb_s / ceiling for sample, ceiling in zip(found, ceilings, strict=True)]
    middle = {
        name: statistics.median(getattr(sample, name) for sample in found)
        for name in ("gb_s", "idle", "hit_rate", "guesses_used", "used", "tok_s")
    }
    share = {"share": statistics.median(shares), "least": min(shares), "most": max(shares)}
    return {"test": test, **share, **middle}


def table(found: dict[str, Any]) -> str:
    """One line a test, for people."""
    lines = [
        "| test | GB/s | of the ceiling | least to most | no read | hits | guesses right | tok/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['test']} | {row['gb_s']:.2f} | {row['share']:.0%} | {row['least']:.0%} to "
            f"{row['most']:.0%} | {row['idle']:.0%} | {row['hit_rate']:.0%} | "
            f"{row['guesses_used']:.0%} | {row['tok_s']:.1f} |"
        )
    peak, planned = found["peak_nbytes"] / 2**20, found["planned_nbytes"] / 2**20
    return "\n".join([*lines, f"peak memory {peak:.0f} MiB, planned {planned:.0f} MiB"])
