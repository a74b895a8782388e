"""Knows how a plan looks to people, line by line; decides nothing and prints through ui."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from moecli import ui
from moecli.cluster import CARD_GIB, Cluster, assumed
from moecli.models.config import ModelSpec
from moecli.models.outline import Own
from moecli.plan_report import PlanReport
from moecli.terminal import is_terminal
from moecli.units import format_nbytes, format_params
from offload.plan import MemoryPlan

Pair = tuple[str, str, str]  # label, for people, in full
Cell = tuple[str, str]  # for people, in full

_PLACEMENTS = {
    "lru": "slots that change by use",
    "pinned": "slots that are filled once",
    "slice": "the first rows of every expert",
}


def show_plan(report: PlanReport) -> None:
    """What the model is, what lies where and why, how fast that is, and what lies beyond."""
    plan = report.plan
    _section(_model_pairs(report))
    columns = ["VRAM", "RAM", "disk only"] if plan.on_device else ["RAM", "disk only"]
    ui.show_table(("", *columns, "because"), _memory_rows(report, columns))
    _gap()
    _section(_placement(plan) + _speeds(report))
    if report.steps and (plan.predicted_tok_s or 0) <= ui.BEYOND_BANDWIDTH:
        ui.show_table(("one more step", "decode tok/s", "limited by"), _step_rows(report))
        _gap()
    sizes = [f"{size} GB" for size in CARD_GIB]
    ui.show_table(("cards that hold it all", "weights", *sizes), _card_rows(report))
    _gap()
    counted = assumed(report.asked.ctx)
    _pairs([("counted", counted, counted)])
    if report.served is not None:
        _gap()
        _show_commands(*report.served)


def _section(pairs: Sequence[Pair]) -> None:
    _pairs(pairs)
    _gap()


def _pairs(pairs: Sequence[Pair]) -> None:
    width = max(len(label) for label, _, _ in pairs) + 2
    ui.show_pairs([(label, _wrapped(shown, width), full) for label, shown, full in pairs])


def _wrapped(text: str, indent: int) -> str:
    columns = min(shutil.get_terminal_size().columns, 100) - indent
    return f"\n{' ' * indent}".join(textwrap.wrap(text, max(columns, 24)))


def _gap() -> None:
    if is_terminal(sys.stdout):
        print()


def _model_pairs(report: PlanReport) -> list[Pair]:
    subject, (scheme, dense) = report.subject, report.asked.schemes
    spec = subject.spec
    rest = "16 bits" if dense is None else dense.name
    params, active = spec.num_params, spec.num_active_params
    counts = f"{format_params(params)}, {format_params(active)} active a token"
    schemes = f"{scheme.name} in experts, {rest} elsewhere"
    pairs = [
        ("model", subject.title, subject.name),
        ("parameters", counts, f"{params}\t{active}"),
        ("scheme", schemes, f"{scheme.name}\t{rest}"),
    ]
    if report.remark:
        pairs.append(("remark", report.remark, report.remark))
    if subject.guessed:
        pairs.append(("figures", subject.guessed, subject.guessed))
    return pairs


# What lies where


def _memory_rows(report: PlanReport, columns: Sequence[str]) -> list[list[Cell]]:
    plan, ctx = report.plan, report.asked.ctx
    fixed = "VRAM" if plan.on_device else "RAM"
    embedding = "VRAM" if plan.embedding_on_device else "RAM"
    dense = {"RAM": plan.host_bias_nbytes, fixed: plan.dense_nbytes}
    experts = {"VRAM": plan.device_pool_nbytes, "RAM": plan.host_arena_nbytes}
    lines: list[tuple[str, dict[str, int], str]] = [
        ("dense weights", dense, "every token reads all"),
        ("embedding", {embedding: plan.embedding_nbytes}, "one row a token"),
        (f"KV cache, {ctx} tokens", {fixed: plan.kv_nbytes}, _cache(report)),
        ("workspace", {fixed: plan.workspace_nbytes}, _workspace(report)),
        *(_device_lines(plan) if plan.on_device else []),
        ("experts", {**experts, "disk only": plan.disk_nbytes}, _experts(plan)),
        ("free of the budget", {"VRAM": plan.vram_free, "RAM": plan.ram_free}, ""),
        ("budget", {"VRAM": plan.vram_budget, "RAM": plan.ram_budget}, ""),
    ]
    return [
        [(label, label), *(_size(cells.get(column, 0)) for column in columns), (why, why)]
        for label, cells, why in lines
    ]


def _device_lines(plan: MemoryPlan) -> list[tuple[str, dict[str, int], str]]:
    moving = {"VRAM": plan.staging_nbytes, "RAM": plan.bounce_nbytes}
    return [
        ("CUDA itself", {"VRAM": plan.context_nbytes}, "context, libraries"),
        ("experts on their way", moving, "prompts pass through"),
    ]


def _cache(report: PlanReport) -> str:
    """How many layers hold how much of the context."""
    spec, ctx = report.asked.spec, report.asked.ctx
    if not isinstance(spec, Own):
        return "kept by transformers"
    held = [spec.kv_capacity(layer, ctx) for layer in range(spec.num_layers)]
    short = [tokens for tokens in held if tokens < ctx]
    if not short:
        return f"{spec.num_layers} layers hold all"
    return f"{len(short)} of {spec.num_layers} hold {max(short)}"


def _workspace(report: PlanReport) -> str:
    """Whose activations take the most: a picture passes its tower before its tokens do."""
    spec = report.asked.spec
    sees = isinstance(spec, ModelSpec) and spec.vision is not None
    return "a picture's activations" if sees else "a prompt's activations"


def _experts(plan: MemoryPlan) -> str:
    if plan.disk_nbytes:
        return "disk: read when asked"
    if not plan.on_device:
        return "all are in memory"
    if not plan.lanes:
        return "all are in VRAM"
    return "RAM has the others" if plan.placement == "pinned" else "RAM has all, VRAM some"


def _size(nbytes: int) -> Cell:
    return (format_nbytes(nbytes) if nbytes else "", str(nbytes))


# How fast


def _placement(plan: MemoryPlan) -> list[Pair]:
    """Where experts are and how they come from there."""
    total = plan.total_experts
    if not plan.on_device:
        return [("slots", ui.places(plan), f"{plan.host_slots}\t{total}")]
    in_vram = f"{plan.device_slots}\t{plan.host_slots}\t{total}"
    if plan.slice_size:
        in_vram = f"{plan.slice_size}\t{plan.intermediate_size}\t{plan.host_slots}\t{total}"
    pairs = [
        ("placement", f"{plan.placement}: {_PLACEMENTS[plan.placement]}", plan.placement),
        ("rows" if plan.slice_size else "slots", ui.places(plan), in_vram),
    ]
    if not plan.lanes:
        return pairs
    lanes = {
        ("link",): "comes over the link",
        ("host",): "is computed by the processor",
        ("link", "host"): f"{plan.link_share:.0%} over the link, the rest by the processor",
    }
    if plan.link_share < 0.005:  # with one expert a token the faster lane serves each miss
        lanes["link", "host"] = "is computed by the processor; the link fills slots"
    staging = f"pass through VRAM, {plan.staging_slots} experts at a time"
    return [
        *pairs,
        ("what VRAM lacks", lanes[plan.lanes], f"{' '.join(plan.lanes)}\t{plan.link_share}"),
        ("prompts' experts", staging, str(plan.staging_slots)),
    ]


def _speeds(report: PlanReport) -> list[Pair]:
    """What bandwidth allows."""
    plan = report.plan
    pairs = [_hits(plan)]
    if plan.predicted_tok_s is None:
        said = f"unknown; {_unknown(report)}"
        return [*pairs, ("decode tok/s", said, "\t"), *_prefill(plan)]
    said = ui.at_most(plan.predicted_tok_s, plan.bottleneck)
    pairs.append(("decode tok/s", said, f"{plan.predicted_tok_s}\t{plan.bottleneck}"))
    if plan.lanes:
        alone = (("link alone", plan.link_tok_s), ("CPU alone", plan.host_tok_s))
        pairs += [
            (f"  {name}", ui.tok_s(rate), str(rate)) for name, rate in alone if rate is not None
        ]
    return [*pairs, *_prefill(plan)]


def _hits(plan: MemoryPlan) -> Pair:
    share = plan.hit_rate_assumed
    if plan.slice_size:
        said = f"{share:.1%} of every expert, in each step"
    elif share == 1:
        said = "100%: nothing ever moves"
    else:
        said = f"{share:.1%}, as if experts were asked for alike"
    return ("hits assumed", said, str(share))


def _unknown(report: PlanReport) -> str:
    """Which option would say the bandwidth that a prediction lacks."""
    plan, machine = report.plan, report.asked.machine
    missing = {
        "--disk": plan.disk_nbytes_per_token and not machine.disk_bw,
        "--link": plan.link_nbytes_per_token and not (machine.zero_copy_bw or machine.link_bw),
        "--cpu-bw": plan.ram_nbytes_per_token and not machine.host_bw,
        "--vram-bw": plan.on_device and not machine.vram_bw,
    }
    named = [f"`{option}`" for option, lacks in missing.items() if lacks]
    return f"say {' and '.join(named)}" if named else "a bandwidth is unknown"


def _prefill(plan: MemoryPlan) -> list[Pair]:
    rate, limit = plan.predicted_prefill_tok_s, plan.prefill_bottleneck
    if rate is None:
        return [("prefill tok/s", "unknown", "\t")]
    said = f"at most {_whole(rate)}, limited by {ui.limit(limit)}"
    if limit == "vram":
        said = "not predicted: the card's arithmetic decides"
    return [("prefill tok/s", said, f"{rate}\t{limit}")]


def _whole(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


# What lies beyond


def _step_rows(report: PlanReport) -> list[list[Cell]]:
    plan = report.plan
    today = ("as planned", plan.predicted_tok_s, plan.bottleneck)
    taken = [(step.what, step.tok_s, step.bottleneck) for step in report.steps]
    rows: list[list[Cell]] = []
    for what, rate, bottleneck in (today, *taken):
        shown = "does not fit" if rate is None else ui.tok_s(rate)
        limit = ui.limit(bottleneck) if bottleneck else ""
        full = "" if rate is None else str(rate)
        rows.append([(what, f"step: {what}"), (shown, full), (limit, bottleneck or "")])
    return rows


def _card_rows(report: PlanReport) -> list[list[Cell]]:
    return [
        [
            (holding.scheme, f"cards: {holding.scheme}"),
            (format_nbytes(holding.nbytes), str(holding.nbytes)),
            *(_cards(found) for found in holding.clusters),
        ]
        for holding in report.holdings
    ]


def _cards(found: Cluster | None) -> Cell:
    if found is None:
        return ("", "")
    nodes = f", {found.num_nodes} nodes" if found.num_nodes > 1 else ""
    return (f"{found.num_cards}{nodes}", str(found.num_cards))


def _show_commands(cards: str, commands: Sequence[str]) -> None:
    """Commands stand alone on their lines, to be copied."""
    ui.show_pairs([("vLLM", f"on {cards}: documented by vLLM, not tried here", cards)])
    for command in commands:
        ui.show_command(command)
