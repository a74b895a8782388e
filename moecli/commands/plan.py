"""Knows what `moecli plan` asks of offload.plan, and for which machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import known, options, store, ui
from moecli.card import takes_card
from moecli.commands.plan_source import PlanSource
from moecli.config import EngineConfig
from moecli.settings import Settings
from moecli.units import parse_bandwidth
from offload.errors import OffloadError
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from moecli.models.outline import Counted
    from moecli.plan_report import Subject
    from moecli.planning import Question
    from offload.hardware import Machine
    from quant.layout import ExpertLayout

HELP = """Show what would lie where, and how fast bandwidth would let it run.

This is the placement that `run` and `chat` make. It reads config.json, no weights: a model of the
hub need not be downloaded. The budgets and bandwidths may be those of another machine; what is not
given is measured here, once, and kept: `moecli doctor` measures anew. It also says what one more
step would buy, and how many cards would hold all. Exits with 1 where the model does not fit.

Built in, by name: SPECS.""".replace("SPECS", ", ".join(spec.name for spec in known.SPECS))
EXAMPLES = """
moecli plan demo --ram 16MiB
moecli plan llama4-scout --ctx 32k --vram 24GiB --ram 64GiB --link 25GB/s --vram-bw 1TB/s
moecli plan Qwen/Qwen3-30B-A3B -q int8 --vram 16GiB
"""
# What most cards of the last years surpass; of a card that is not here and not described.
_VRAM_BW_ASSUMED = 300e9
_MEASURED_NBYTES = 128 << 20  # of an expert that is timed


def _bandwidth(name: str, help: str) -> object:
    return options.option(name, metavar="RATE", help=help)


@options.gathering(**options.PLAN)
def plan(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    *,
    given: dict[str, Any],
    ram_bw: Annotated[str | None, _bandwidth("--ram-bw", "RAM is read at: `60GB/s`.")] = None,
    cpu_bw: Annotated[
        str | None, _bandwidth("--cpu-bw", "The processor computes experts at: `40GB/s`.")
    ] = None,
    disk_bw: Annotated[str | None, _bandwidth("--disk", "The disk is read at: `7GB/s`.")] = None,
    link_bw: Annotated[
        str | None, _bandwidth("--link", "RAM reaches the graphics card at: `25GB/s`.")
    ] = None,
    vram_bw: Annotated[str | None, _bandwidth("--vram-bw", "VRAM is read at: `900GB/s`.")] = None,
    scheme_name: Annotated[
        str,
        options.option(
            "-q", "--scheme", metavar="NAME", help="Where MODEL is not quantized yet: int4 or int8."
        ),
    ] = "int4",
    text_only: Annotated[
        bool,
        options.option("--text-only", help="Keep no room for looking at pictures, as `run`."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    source = PlanSource.find(options.require_model(context, model, model_flag))
    config = replace(Settings.read(**given).engine_config(), pictures=not text_only)
    rates = {
        "ram_bw": _rate(ram_bw, "--ram-bw"),
        "host_bw": _rate(cpu_bw, "--cpu-bw"),
        "disk_bw": _rate(disk_bw, "--disk"),
        "link_bw": _rate(link_bw, "--link"),
        "zero_copy_bw": _rate(link_bw, "--link"),
        "vram_bw": _rate(vram_bw, "--vram-bw"),
    }
    from moecli.plan_report import make_report
    from moecli.plan_view import show_plan

    subject, asked = _question(source, scheme_name, config, rates)
    try:
        report = make_report(subject, asked)
    except OffloadError as error:
        raise OffloadError(f"{subject.title}: {error.message}", error.hint) from error
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show_plan(report)


def _rate(text: str | None, name: str) -> float | None:
    return None if text is None else parse_bandwidth(text, f"`{name}`")


def _question(
    source: PlanSource, scheme_name: str, config: EngineConfig, rates: dict[str, float | None]
) -> tuple["Subject", "Question"]:
    from moecli.engine import context_size
    from moecli.models.hf_outline import read_counted
    from moecli.models.outline import Own
    from moecli.opening_device import within_library
    from moecli.planning import Question

    spec = read_counted(source.config())
    ctx = context_size(config.ctx, spec)
    on_card = config.vram_nbytes is not None or config.device == "cuda"
    if source.path is not None and not on_card and not isinstance(spec, Own):
        config = within_library(config, spec, ctx, ui.show_note)
    schemes = source.schemes(spec, scheme_name)
    machine = _machine(source.path or store.models_dir(), spec, schemes[0], config, rates)
    return source.subject(spec, schemes[0]), Question(spec, schemes, ctx, config, machine)


def _machine(
    path: Path,
    spec: "Counted",
    scheme: QuantScheme,
    config: EngineConfig,
    rates: dict[str, float | None],
) -> "Machine":
    """This machine at the given rates, where they are given; the others are measured."""
    import torch

    from moecli.measuring import largest_file, with_compute
    from offload.hardware import detect
    from offload.measured import with_bandwidths

    machine = detect(path, gpu=config.device != "cpu")
    if config.device == "cuda" and config.vram_nbytes is None:
        takes_card(config)  # or says that there is none
    stated: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    machine = replace(machine, **stated)
    on_card = machine.gpu_name is not None or config.vram_nbytes is not None
    if on_card:
        machine = _described_card(machine)
    if machine.physical_cores is not None:
        torch.set_num_threads(machine.physical_cores)  # as a run does
    shared_by = max(1, config.prefill_chunk * spec.experts_per_token // spec.num_experts)
    machine = with_compute(
        *(machine, _measurable(spec, scheme), spec.experts_per_token),
        shared_by=0 if on_card else shared_by,  # on a card the processor has no part in prompts
        disk=largest_file(path),
    )
    if machine.disk_bw is not None or not path.is_dir():
        return machine
    # Of what is not here: where it would come to lie, if that disk was ever measured.
    return with_bandwidths(machine, measure=False, disk=path)


def _measurable(spec: "Counted", scheme: QuantScheme) -> "ExpertLayout":
    """The layout of an expert, with fewer rows where it is so large that it would take long."""
    from moecli.footprint import expert_layout
    from quant.layout import ExpertLayout

    layout = expert_layout(spec, scheme)
    rows = spec.expert_intermediate_size * _MEASURED_NBYTES // layout.nbytes
    if rows >= spec.expert_intermediate_size:
        return layout
    rows -= rows % scheme.group_size
    return ExpertLayout(spec.hidden_size, rows, scheme)


def _described_card(machine: "Machine") -> "Machine":
    """Says what is not known of a graphics card that is not here."""
    if machine.gpu_name is not None:
        return machine
    if machine.link_bw is None:
        ui.show_note("how fast RAM reaches a graphics card is unknown; say it with `--link`")
    if machine.vram_bw is not None:
        return machine
    rate = ui.bandwidth(_VRAM_BW_ASSUMED)
    ui.show_note(f"VRAM is taken to be read at {rate}; `--vram-bw` says better")
    return replace(machine, vram_bw=_VRAM_BW_ASSUMED)
