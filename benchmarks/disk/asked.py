"""Measures what a manager gets of the disk when experts are asked for and computing is a sleep.

A router that chooses at random asks. Computing is replaced by nothing, or by sleeping as long as a
processor that works through COMPUTE_BW would take, so that the disk is what is measured.
"""

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.disk.ceiling import Ceiling, named
from offload.disk import DiskTier, ExpertSpan
from offload.host import HostArena
from offload.manager import ExpertManager
from quant.checkpoint import QuantizedCheckpoint

COMPUTE_BW = 20e9  # packed bytes a second: a third of what a desktop's memory gives
BETWEEN_S = 0.3e-3  # attention and router of a layer
SHARE = 1 / 3  # of the experts that the arena holds
WAY_S = 1.5


@dataclass(frozen=True)
class Way:
    """How experts are asked for."""

    name: str
    streams: bool = True  # or each layer waits until all it needs is there
    computes: bool = True  # or nothing is done with what came
    guesses: float | None = None  # share of the guesses about the next layer that are right


WAYS = (
    Way("stream, nothing computed", computes=False),
    Way("stream", guesses=None),
    Way("stream, 3 of 4 guesses right", guesses=0.75),
    Way("all at once", streams=False),
    Way("all at once, 3 of 4 guesses right", streams=False, guesses=0.75),
)


@dataclass(frozen=True)
class Row:
    """GB/s read by one way, median over rounds, and its share of the same round's ceiling."""

    model: str
    way: str
    gb_s: float
    share: float
    share_least: float
    share_most: float
    used: float  # of the bytes read, those that were asked for
    hit_rate: float
    tok_s: float  # had the model as many layers as the trace


Request = tuple[int, list[int], list[int]]  # layer, experts, guesses about the next layer


@dataclass(frozen=True)
class Trace:
    """What a router that chooses at random asks for, and what would be guessed."""

    layers: int
    experts: int
    top_k: int

    def requests(self, right: float | None, seed: int) -> Iterator[Request]:
        """Without end; `right`: share of the guesses that are, None where nothing is guessed."""
        draw = random.Random(seed)
        coming = self._choose(draw)
        layer = 0
        while True:
            experts, coming = coming, self._choose(draw)
            guesses = []
            if right is not None:
                guesses = [
                    e if draw.random() < right else draw.randrange(self.experts) for e in coming
                ]
            yield layer, experts, guesses
            layer = (layer + 1) % self.layers

    def _choose(self, draw: random.Random) -> list[int]:
        return draw.sample(range(self.experts), self.top_k)


class Subject:
    """One model's files, with an arena for a share of its experts."""

    def __init__(self, name: str, path: Path) -> None:
        checkpoint = QuantizedCheckpoint.open(path)
        self.name = name
        self.nbytes = checkpoint.layout.nbytes
        self.spans = {
            (layer, expert): ExpertSpan(*checkpoint.expert_span(layer, expert))
            for layer in checkpoint.layers
            for expert in range(checkpoint.num_experts(layer))
        }
        self.trace = Trace(
            len(checkpoint.layers),
            checkpoint.num_experts(checkpoint.layers[0]),
            checkpoint.config["num_experts_per_tok"],
        )
        disk = DiskTier(self.spans, drop_cache=True)
        assert disk.direct, f"the file system of `{path}` has no direct reads"
        slot_nbytes = checkpoint.layout.slot_nbytes
        self.slots = int(SHARE * len(self.spans))
        self.arena = HostArena(self.slots * slot_nbytes, slot_nbytes)
        self.manager = ExpertManager(disk, self.arena)
        self._fill()

    def _fill(self) -> None:
        """Touch every page of the arena: the system's work is not the disk's."""
        for layer, expert in list(self.spans)[: self.slots]:
            self.manager.ensure(layer, [expert]).release()

    def run(self, way: Way, seed: int) -> tuple[float, float, float, float]:
        """(bytes a second, share of them used, hit rate, tokens a second)"""
        manager, before = self.manager, self.manager.stats
        begin = time.perf_counter()
        count = 0
        for layer, experts, guesses in self.trace.requests(way.guesses, seed):
            following = (layer + 1) % self.trace.layers
            if way.streams:
                stream = manager.stream(layer, experts)
                if guesses:
                    manager.prefetch(following, guesses)
                for lease in stream:
                    with lease:
                        self._compute(way, len(lease.addresses))
            else:
                if guesses:
                    manager.prefetch(following, guesses)
                with manager.ensure(layer, experts) as lease:
                    self._compute(way, len(experts))
            if way.computes:
                time.sleep(BETWEEN_S)
            count += 1
            if time.perf_counter() - begin > WAY_S:
                break
        seconds = time.perf_counter() - begin
        manager.cancel_prefetch()
        manager.drain_prefetch()
        found = manager.stats - before
        used = 1 - (found.prefetch_reads - found.prefetch_hits) * self.nbytes / found.disk_nbytes
        assert found.hit_rate is not None
        return (
            found.disk_nbytes / seconds,
            used,
            found.hit_rate,
            count / self.trace.layers / seconds,
        )

    def _compute(self, way: Way, count: int) -> None:
        if way.computes:
            time.sleep(count * self.nbytes / COMPUTE_BW)


def measure(name: str, path: Path, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """The rows of a model, and its ceilings."""
    subject = Subject(name, path)
    ceiling = Ceiling(subject.spans, subject.arena)
    ceilings: list[dict[tuple[int, int], float]] = []
    runs: list[dict[str, tuple[float, float, float, float]]] = []
    for number in range(1, rounds + 1):
        ceilings.append({way: ceiling.measure(way, number) for way in ceiling.ways})
        ways = random.Random(number).sample(WAYS, len(WAYS))
        runs.append({way.name: subject.run(way, number) for way in ways})
    medians = {way: statistics.median(c[way] for c in ceilings) for way in ceiling.ways}
    ceiling.close()
    subject.manager.close()
    best = max(medians, key=lambda way: medians[way])
    rows = []
    for way in WAYS:
        found = [run[way.name] for run in runs]
        shares = [f[0] / c[best] for f, c in zip(found, ceilings, strict=True)]
        middle = [statistics.median(column) for column in zip(*found, strict=True)]
        rows.append(
            Row(
                *(name, way.name, middle[0] / 1e9, statistics.median(shares)),
                *(min(shares), max(shares), middle[1], middle[2], middle[3]),
            )
        )
    return rows, named(medians)


def table(rows: list[Row]) -> str:
    """One line a way, for people."""
    lines = [
        "| experts are asked for | GB/s | of the ceiling | least to most | of it used | hits |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.way} | {row.gb_s:.2f} | {row.share:.0%} | {row.share_least:.0%} to "
            f"{row.share_most:.0%} | {row.used:.0%} | {row.hit_rate:.0%} |"
        )
    return "\n".join(lines)
