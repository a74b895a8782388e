"""Knows how the numbers of an answer look to people, beside those of its plan."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moecli import ui
from moecli.beside import Pair, beside
from moecli.events import GenerationStats
from moecli.terminal import dim, say
from moecli.units import format_nbytes, format_seconds
from offload.plan import MemoryPlan

if TYPE_CHECKING:
    from moecli.vision.kinds import KindChoices

_MEMORIES = {"ram": "RAM", "vram": "VRAM", "link": "RAM over the link", "disk": "disk"}


def stats_line(stats: GenerationStats, plan: MemoryPlan) -> str:
    """The numbers of an answer in one line; the planned speed in brackets."""
    parts = [f"{stats.generated_tokens} tokens"]
    if stats.decode_tok_s:
        rate = plan.predicted_tok_s
        planned = f" ({ui.tok_s(rate)} planned)" if rate is not None else ""
        parts.append(f"{stats.decode_tok_s:.1f} tok/s{planned}")
    parts.append(f"first after {format_seconds(stats.ttft_s)}")
    if stats.hit_rate is not None:
        parts.append(f"expert hits {stats.hit_rate:.1%}")
    parts.append(_peaks(stats, "peak memory "))
    return ", ".join(parts)


def _peaks(stats: GenerationStats, label: str) -> str:
    ram = f"{label}{format_nbytes(stats.peak_rss_nbytes)}"
    vram = stats.peak_vram_nbytes
    return ram if vram is None else f"{ram} and {format_nbytes(vram)} of VRAM"


def show_stats_line(stats: GenerationStats, plan: MemoryPlan) -> None:
    say(dim(stats_line(stats, plan), sys.stderr))


def show_timings(stats: GenerationStats, plan: MemoryPlan) -> None:
    """The numbers of a run, beside what the plan had predicted."""
    found = beside(plan, stats)
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    lines = [
        f"prompt   {stats.prompt_tokens} tokens{cached}, {stats.prefill_tok_s:.1f} tok/s, "
        f"first token after {format_seconds(stats.ttft_s)}",
        f"answer   {stats.generated_tokens} tokens, {stats.decode_tok_s:.1f} tok/s"
        + _said(found.tok_s, plan),
    ]
    if read := a_token(found.a_token, found.hit_rate):
        lines.append(f"a token  {read}")
    lines.append(f"experts  {_hits(stats)}; {ui.places(plan)}")
    if served := _served(stats):
        lines.append(f"lanes    {served}")
    lines.append(f"memory   {_taken(stats, plan)}")
    if stats.image_tokens:
        looked = f", looked at for {format_seconds(stats.looking_s)}" if stats.looking_s else ""
        lines.insert(1, f"pictures {stats.image_tokens} tokens of the prompt{looked}")
    for line in lines:
        say(dim(line, sys.stderr))


def show_choices(choices: "KindChoices") -> None:
    """Which experts the image and the text tokens of prompts chose, where there were both."""
    alike = choices.alike()
    if not alike:
        return
    kinds = (("image", choices.image), ("text", choices.text))
    shares = [
        f"the busiest expert of a layer takes {choices.busiest(kind):.1%} of {name} tokens"
        for name, kind in kinds
    ]
    least = min(alike, key=lambda layer: alike[layer])
    hottest = [
        f"{name} tokens choose {', '.join(map(str, choices.hottest(kind[least])))}"
        for name, kind in kinds
    ]
    mean = sum(alike.values()) / len(alike)
    say(dim(f"choices  {', '.join(shares)}; alike in {mean:.1%}", sys.stderr))
    where = f"in layer {least} ({alike[least]:.1%})"
    say(dim(f"         least alike {where}: {', '.join(hottest)} most", sys.stderr))


def _said(rate: Pair, plan: MemoryPlan) -> str:
    """What was planned of a speed, and what to do where that is missing or was too little."""
    if rate.planned is None:
        return " (not planned: a bandwidth is not measured yet; `moecli plan` does that)"
    said = ui.at_most(rate.planned, plan.bottleneck)
    if (rate.measured or 0) > rate.planned and rate.planned <= ui.BEYOND_BANDWIDTH:
        said += "; faster than that, so `moecli doctor --refresh` should measure again"
    return f" (planned: {said})"


def a_token(read: Mapping[str, Pair], hit_rate: Pair) -> str:
    """What a token of an answer has read from where, beside what it was planned to."""
    parts = [
        f"{format_nbytes(pair.measured)} from {_MEMORIES[name]} "
        f"({format_nbytes(pair.planned or 0)} planned)"
        for name, pair in read.items()
        if pair.measured is not None
    ]
    if hit_rate.measured is not None:
        planned = "" if hit_rate.planned is None else f" ({hit_rate.planned:.1%} planned)"
        parts.append(f"{hit_rate.measured:.1%} of experts hit{planned}")
    return ", ".join(parts)


def _taken(stats: GenerationStats, plan: MemoryPlan) -> str:
    """Peak memory; what of it is the model's is what the plan speaks of."""
    peaks = _peaks(stats, "peak ")
    if stats.grown_rss_nbytes is not None:
        peaks += f", {format_nbytes(stats.grown_rss_nbytes)} of RAM since the model was opened"
    return f"{peaks}; the plan takes {ui.memory(plan)}"


def _hits(stats: GenerationStats) -> str:
    """Of what prompt and answer have asked for, what was there."""
    sliced = f"{stats.experts_sliced} asked for by slices"
    if stats.hit_rate is None:
        return sliced if stats.experts_sliced else "none asked for"
    read = format_nbytes(stats.expert_nbytes_read)
    requests = stats.expert_hits + stats.expert_misses
    hits = f"{stats.hit_rate:.1%} of {requests} hit, {read} read"
    return f"{sliced}, {hits}" if stats.experts_sliced else hits


def _served(stats: GenerationStats) -> str:
    """How experts that VRAM lacked were served while decoding."""
    kinds = (
        (stats.experts_fetched, "fetched"),
        (stats.experts_linked, "read in place over the link"),
        (stats.experts_hosted, "computed by the processor"),
    )
    parts = [f"{count} {kind}" for count, kind in kinds if count]
    if stats.link_nbytes:
        parts.append(f"{format_nbytes(stats.link_nbytes)} over the link in all")
    return ", ".join(parts)
