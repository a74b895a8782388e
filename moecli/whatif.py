"""Knows what one more step of a machine, or of quantization, would do to a plan's speed."""

from dataclasses import dataclass, replace
from typing import Any

from moecli.errors import MoecliError
from moecli.planning import Question
from moecli.schemes import fitting
from moecli.units import GIB
from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import MemoryPlan
from quant.errors import QuantError
from quant.scheme import QuantScheme

MORE_RAM, MORE_VRAM = 16 * GIB, 8 * GIB
_WORTH_SAYING = 0.02  # of today's speed: a plan is not more exact


@dataclass(frozen=True)
class Step:
    """One change, and the decode speed that is predicted with it; `tok_s` None: it does not fit."""

    what: str
    tok_s: float | None
    bottleneck: str | None


def steps(asked: Question, plan: MemoryPlan) -> tuple[Step, ...]:
    """Each step taken by itself from `plan`, the answer to `asked`; only those that change it.

    None where the plan predicts no speed.
    """
    if plan.predicted_tok_s is None:
        return ()
    taken = [(what, _answer(changed)) for what, changed in _changes(asked, plan)]
    return tuple(
        Step(what, None, None)
        if made is None
        else Step(what, made.predicted_tok_s, made.bottleneck)
        for what, made in taken
        if made is None or _differs(made, plan.predicted_tok_s)
    )


def _answer(asked: Question) -> MemoryPlan | None:
    try:
        return asked.answer()
    except (OffloadError, MoecliError, QuantError):
        return None  # it does not fit, or cannot be


def _differs(made: MemoryPlan, today: float) -> bool:
    rate = made.predicted_tok_s
    return rate is not None and abs(rate - today) > _WORTH_SAYING * today


def _changes(asked: Question, plan: MemoryPlan) -> list[tuple[str, Question]]:
    """Budgets are those of the plan, so that a share of what is free stays what it was."""
    config = replace(asked.config, ram_nbytes=plan.ram_budget, vram_nbytes=plan.vram_budget)
    now = replace(asked, config=config)
    machine, found = asked.machine, []
    more_ram = replace(config, ram_nbytes=plan.ram_budget + MORE_RAM)
    found.append(("16 GiB more RAM", replace(now, config=more_ram)))
    if plan.on_device:
        more_vram = replace(config, vram_nbytes=plan.vram_budget + MORE_VRAM)
        found.append(("8 GiB more VRAM", replace(now, config=more_vram)))
        link = _twice_as_fast(machine, "link_bw", "zero_copy_bw")
        found.append(("a link twice as fast", replace(now, machine=link)))
    ram = _twice_as_fast(machine, "ram_bw", "host_bw")
    found.append(("RAM and processor twice as fast", replace(now, machine=ram)))
    disk = _twice_as_fast(machine, "disk_bw")
    found.append(("a disk twice as fast", replace(now, machine=disk)))
    return [*found, _other_scheme(now)]


def _twice_as_fast(machine: Machine, *names: str) -> Machine:
    known = {name: getattr(machine, name) for name in names}
    changed: dict[str, Any] = {name: 2 * rate for name, rate in known.items() if rate is not None}
    return replace(machine, **changed)


def _other_scheme(asked: Question) -> tuple[str, Question]:
    scheme, dense = asked.schemes
    other = fitting(asked.spec, QuantScheme.parse("int8" if scheme.bits == 4 else "int4"), True)
    return f"experts in {other.name}", replace(asked, schemes=(other, dense))
