"""Knows how fast whole models decode and read prompts, for every placement, lane and routing,
beside what this run's bandwidths allow.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.machine import bandwidths, device_of, sizes_of
from benchmarks.gpu.model import KeptArena, Run, Subject
from benchmarks.gpu.report import Section
from benchmarks.gpu.roofline import Bandwidths, StepBytes, bound
from benchmarks.gpu.sizes import ModelArm, Sizes
from benchmarks.gpu.timing import synchronize
from benchmarks.gpu.trace_router import STAY, ZIPF_EXPONENT, Skew, make_trace
from moecli.backends import use_kernels
from moecli.config import SamplingConfig
from moecli.device_tiers import MakeArena
from moecli.graphs import Capture, captured, eager
from offload.errors import OffloadError
from offload.hardware import detect, peak_rss_nbytes
from offload.plan import MemoryPlan

_WARM_STEPS = 8
_LEAST_STEPS = 8
_STEPS_S = 3.5  # of one arm and routing; a slow lane gets fewer steps
_ARM_S = 18.0  # what an arm may take
_MODEL_S = 50.0  # what is kept back for each model still to come: memory, and its first arms
_POSITIONS = 512  # of a trace
SKEWS: tuple[Skew, ...] = ("zipf", "uniform")
# The most telling first: what comes late may find no time left.
_WAYS = (
    *(("lru", "link"), ("slice", "both"), ("slice", "link"), ("pinned", "both")),
    *(("lru", "both"), ("pinned", "link"), ("slice", "cpu"), ("pinned", "cpu")),
)
_RESIDENT_WAYS = (("lru", "link"), ("pinned", "both"))


@dataclass(frozen=True)
class Way:
    name: str
    vram_nbytes: int
    placement: str
    lane: str


def measure(section: Section, tiny: bool, found: dict[str, Any]) -> None:
    device, sizes = device_of(tiny), sizes_of(tiny)
    use_kernels("torch" if tiny else "auto", device)  # whole models are too much to interpret
    torch.set_num_threads(detect().physical_cores or torch.get_num_threads())
    section.part("traces", lambda: {"zipf_exponent": ZIPF_EXPONENT, "stay": STAY})
    for number, arm in enumerate(sizes.models, 1):
        later_s = 0.0 if tiny else _MODEL_S * (len(sizes.models) - number)
        needs_s = later_s + (0.0 if tiny else _ARM_S)
        rates = bandwidths(found, f"{arm.name} {arm.scheme.name}")
        subject = Subject.of(arm, device, rates)
        arena: list[KeptArena] = []
        section.part(f"{arm.name}: memory", functools.partial(_take, subject, arena), needs_s)
        if not arena:
            continue
        with closing(arena[0]):
            for way in ways(arm, subject):
                run = functools.partial(measure_way, subject, way, sizes, rates, arena[0].lend)
                section.part(f"{arm.name}: {way.name}", run, needs_s)
                _reset_peaks(device)


def _take(subject: Subject, arena: list[KeptArena]) -> dict[str, Any]:
    begin = time.perf_counter()
    arena.append(subject.keep_arena())
    return {
        "seconds": time.perf_counter() - begin,
        "slots": subject.footprint.total_experts,
        "pinned_slots": arena[0].pinned_slots,
        "slot_nbytes": subject.footprint.slot_nbytes,
    }


def ways(arm: ModelArm, subject: Subject) -> list[Way]:
    """Everything to try with a model."""
    budgets = {f"{nbytes / 2**30:g} GiB": nbytes for nbytes in arm.vram_nbytes}
    budgets |= {f"{share:.0%} resident": _vram_for(subject, share) for share in arm.residencies}
    found = []
    for name, nbytes in budgets.items():
        pairs = _WAYS if arm.every_way else _RESIDENT_WAYS
        if name == "100% resident":
            pairs = _RESIDENT_WAYS[1:]  # nothing is missing, so nothing differs
        found += [Way(f"{p}, {lane}, {name}", nbytes, p, lane) for p, lane in pairs]
    return found


def _vram_for(subject: Subject, share: float) -> int:
    """The smallest budget, within half an expert, whose plan holds that share of them in VRAM."""
    footprint = subject.footprint
    low, high = 0, 2 * (footprint.on_device_nbytes + footprint.embedding_nbytes)
    high += 2 * footprint.total_experts * footprint.slot_nbytes + (2 << 30)
    placement = "lru" if share < 1 else "pinned"
    while high - low > footprint.slot_nbytes // 2:
        middle = (low + high) // 2
        try:
            enough = subject.plan(middle, placement, "both").device_resident_share >= share
        except OffloadError:  # too small for anything
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


def measure_way(
    subject: Subject, way: Way, sizes: Sizes, rates: Bandwidths | None, make_arena: MakeArena
) -> dict[str, Any]:
    """One placement and lane: prompts, and decoding under each routing."""
    begin = time.perf_counter()
    device = subject.device
    plan = subject.plan(way.vram_nbytes, way.placement, way.lane)
    _reset_peaks(device)
    launches: list[Spent] = []
    traces = {skew: _trace(subject, skew) for skew in SKEWS}
    capture = _timed(captured if device.type == "cuda" else eager, launches)
    with closing(Run(subject, plan, traces[SKEWS[0]], capture, make_arena)) as run:
        result: dict[str, Any] = {
            "setup_s": time.perf_counter() - begin,
            "plan": _plan_row(plan),
            "notes": run.notes,
            "prefill": {str(n): prefill(run, n, rates) for n in sizes.prompts},
            "decode": {},
        }
        for skew in SKEWS:
            run.trace.become(traces[skew])
            launches.clear()
            result["decode"][skew] = decode(run, sizes.steps, rates, launches)
        result["memory"] = _memory(device, plan)
    return result


def _trace(subject: Subject, skew: Skew) -> torch.Tensor:
    spec = subject.spec
    layers = len(spec.moe_layers)
    return make_trace(skew, _POSITIONS, layers, spec.num_experts, spec.experts_per_token)


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and of work by this thread: while it waits it does none."""

    wall_s: float
    busy_s: float

    @classmethod
    def until_now(cls) -> "Spent":
        return cls(time.perf_counter(), time.thread_time())

    def since(self, begin: "Spent") -> "Spent":
        return Spent(self.wall_s - begin.wall_s, self.busy_s - begin.busy_s)


def _timed(capture: Capture, launches: list[Spent]) -> Capture:
    """Notes what each launch of a captured step takes of the host."""

    def wrapped(step: Callable[[], None]) -> Callable[[], None]:
        replay = capture(step)

        def call() -> None:
            begin = Spent.until_now()
            replay()
            launches.append(Spent.until_now().since(begin))

        return call

    return wrapped


def prefill(run: Run, num_tokens: int, rates: Bandwidths | None) -> dict[str, float | None]:
    """A prompt, read twice from the beginning: the first time compiles and warms up.

    Beside it what the link alone would take for the bytes that came over it.
    """
    seconds, moved = 0.0, 0
    for _ in range(2):
        before = run.parts.stats.device_nbytes
        session = run.parts.new_session()
        synchronize(run.subject.device)
        begin = time.perf_counter()
        with run.parts.running():
            run.prefill(session, num_tokens)
            synchronize(run.subject.device)
        seconds = time.perf_counter() - begin
        moved = run.parts.stats.device_nbytes - before
    link_s = None if rates is None else moved / rates.link
    return {
        "ttft_s": seconds,
        "tok_s": num_tokens / seconds,
        "moved_nbytes": moved,
        "link_s": link_s,
        "share_of_link": None if link_s is None else link_s / seconds,
    }


def decode(run: Run, steps: int, rates: Bandwidths | None, launches: list[Spent]) -> dict[str, Any]:
    """Single tokens after a short prompt; the median of what each took."""
    session = run.parts.new_session()
    prompt, warm = min(16, run.subject.arm.ctx // 4), min(_WARM_STEPS, steps)
    ends: list[Spent] = []
    with run.parts.running():
        logits = run.prefill(session, prompt)
        before = _served(run)
        with closing(run.parts.tokens(session, logits, SamplingConfig(temperature=0))) as tokens:
            for _ in tokens:
                ends.append(Spent.until_now())
                spent = ends[-1].since(ends[min(warm, len(ends) - 1)])
                late = len(ends) > warm + _LEAST_STEPS and spent.wall_s > _STEPS_S
                if late or len(ends) > warm + steps:
                    break
        synchronize(run.subject.device)
        after = _served(run)
    times = [b.since(a) for a, b in pairwise(ends[warm:])]
    step = statistics.median(time.wall_s for time in times)
    row = {
        "steps": len(times),
        "tok_s": 1 / step,
        "step_s": step,
        "slowest_step_s": max(time.wall_s for time in times),
        "host": _host(times, launches[-len(times) :]),
        "served": {lane: after[lane] - before[lane] for lane in after},
    }
    moved = step_bytes(run, row["served"], prompt + len(ends))
    row["bytes_a_token"] = moved
    if rates is not None:
        limit = bound(moved, rates)
        row["bound"] = limit
        row["share_of_bound"] = row["tok_s"] / limit.overlapped_tok_s
    return row


def _host(steps: list[Spent], launches: list[Spent]) -> dict[str, float]:
    """What a step takes of the host: launching it, and all that it does besides."""
    launch_s = statistics.median(launch.busy_s for launch in launches)
    step_s = statistics.median(step.busy_s for step in steps)
    return {
        "launch_wall_s": statistics.median(launch.wall_s for launch in launches),
        "launch_busy_s": launch_s,
        "besides_busy_s": max(0.0, step_s - launch_s),
    }


def _served(run: Run) -> dict[str, int]:
    """How often each lane served an expert so far, and how many came to slots besides; nothing is
    counted of slices."""
    cache = run.parts.tiers.cache
    if cache is None:
        return {}
    counts = cache.counters()
    lanes = ("hits", "fetched", "linked", "host")
    served = {lane: sum(getattr(layer, lane) for layer in counts) for lane in lanes}
    return served | {"arrived": cache.num_arrived}


def step_bytes(run: Run, served: dict[str, int], position: int) -> StepBytes:
    """What a token moved on average, by the shares of the lanes, or by the cut of slices."""
    plan, spec, layout = run.plan, run.subject.spec, run.subject.layout
    active = len(spec.moe_layers) * spec.experts_per_token * layout.nbytes
    dense = plan.dense_nbytes + spec.kv_nbytes(position, 2)
    if plan.slice_size:
        rows = layout.intermediate_size
        sliced, linked = plan.slice_size / rows, plan.link_size / rows
        host = 1 - sliced - linked
        return StepBytes(dense + active * sliced, 0, active * linked, active * host)
    total = sum(served.values()) - served["arrived"]
    assert total, "no expert was served"
    part = {lane: active * count / total for lane, count in served.items()}
    return StepBytes(dense + part["hits"], part["fetched"], part["linked"], part["host"])


# Memory


def _plan_row(plan: MemoryPlan) -> dict[str, Any]:
    names = (
        *("placement", "lanes", "vram_budget", "vram_nbytes", "ram_nbytes", "device_slots"),
        *("host_slots", "staging_slots", "slice_size", "link_size", "device_resident_share"),
        *("context_nbytes", "workspace_nbytes", "predicted_tok_s", "bottleneck"),
        *("predicted_prefill_tok_s",),
    )
    return {name: getattr(plan, name) for name in names}


def _reset_peaks(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _memory(device: torch.device, plan: MemoryPlan) -> dict[str, Any]:
    """Peaks beside what was planned. Main memory holds all arms' arena, so more than one plan's."""
    row: dict[str, Any] = {
        "planned_vram_nbytes": plan.vram_nbytes,
        "planned_ram_nbytes": plan.ram_nbytes,
        "peak_rss_nbytes": peak_rss_nbytes(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.max_memory_allocated(device)
        row |= {
            "peak_allocated_nbytes": allocated,
            "peak_reserved_nbytes": torch.cuda.max_memory_reserved(device),
            "device_used_nbytes": total - free,
            "within_plan": allocated + plan.context_nbytes <= plan.vram_nbytes,
        }
    return row
