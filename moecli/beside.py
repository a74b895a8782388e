"""Knows what a plan had predicted of a run, beside what was measured of it; shows nothing."""

from dataclasses import asdict, dataclass

from moecli.events import GenerationStats
from moecli.roofline import Traffic, decode_traffic
from offload.plan import MemoryPlan


@dataclass(frozen=True)
class Pair:
    """A number as it was planned and as it was measured; None where it is not known."""

    planned: float | None
    measured: float | None


@dataclass(frozen=True)
class Beside:
    """Of decoding: rates in tokens a second, shares of requests, bytes of a token by the memory
    that they are read from. Of the whole run: the most bytes of each memory.
    """

    tok_s: Pair
    hit_rate: Pair
    a_token: dict[str, Pair]  # by memory, those that either knows of
    ram_nbytes: Pair  # taken since the model was opened
    vram_nbytes: Pair


def planned_traffic(plan: MemoryPlan) -> Traffic:
    """What a token of an answer is expected to read."""
    return Traffic(
        plan.ram_nbytes_per_token,
        plan.vram_nbytes_per_token,
        plan.link_nbytes_per_token,
        plan.disk_nbytes_per_token,
    )


def by_memory(planned: Traffic, measured: Traffic | None) -> dict[str, Pair]:
    """Those that neither reads are left out."""
    found = {}
    for name, expected in asdict(planned).items():
        seen = None if measured is None else getattr(measured, name)
        if expected or seen:
            found[name] = Pair(expected, seen)
    return found


def hits(plan: MemoryPlan, measured: float | None) -> Pair:
    """Slices are always there in part: they are neither hits nor misses."""
    return Pair(None if plan.slice_size else plan.hit_rate_assumed, measured)


def beside(plan: MemoryPlan, stats: GenerationStats) -> Beside:
    """The plan of a run, and the numbers of one of its answers."""
    counted, steps = stats.decoded, stats.decode_steps
    measured = decode_traffic(plan, counted, steps, steps) if steps else None
    vram = plan.vram_nbytes if plan.on_device else None
    return Beside(
        tok_s=Pair(plan.predicted_tok_s, stats.decode_tok_s or None),
        hit_rate=hits(plan, counted.hit_rate),
        a_token=by_memory(planned_traffic(plan), measured),
        ram_nbytes=Pair(plan.ram_nbytes, stats.grown_rss_nbytes),
        vram_nbytes=Pair(vram, stats.peak_vram_nbytes),
    )
