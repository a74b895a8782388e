"""Knows what `moecli plan` asks of offload.plan, and for which machine."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import options, store, ui
from moecli.card import takes_card
from moecli.commands.show import Readable
from moecli.config import EngineConfig
from moecli.settings import Settings
from moecli.units import parse_bandwidth
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from moecli.models.facts import ModelFacts
    from offload.hardware import Machine

HELP = """Show what would lie where, and how fast bandwidth would let it run.

This is the placement that `run` and `chat` make. It reads config.json, no weights: a model of the
hub need not be downloaded. The budgets and
bandwidths may be those of another machine; what is not given is measured here, once, and kept:
`moecli doctor` measures anew. Exits with 1 where the model does not fit."""
EXAMPLES = """
moecli plan demo --ram 16MiB
moecli plan scout-int4 --ctx 32k --vram 20GiB
moecli plan ./Llama-4-Scout-17B-16E-Instruct --vram 24GiB --ram 64GiB --link 25GB/s --vram-bw 1TB/s
"""
# What most cards of the last years surpass; of a card that is not here and not described.
_VRAM_BW_ASSUMED = 300e9


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
    as_json: options.Json = False,
) -> None:
    readable = Readable.find(options.require_model(context, model, model_flag))
    from moecli.planning import plan_model

    config = Settings.read(**given).engine_config()
    rates = {
        "ram_bw": _rate(ram_bw, "--ram-bw"),
        "host_bw": _rate(cpu_bw, "--cpu-bw"),
        "disk_bw": _rate(disk_bw, "--disk"),
        "link_bw": _rate(link_bw, "--link"),
        "zero_copy_bw": _rate(link_bw, "--link"),
        "vram_bw": _rate(vram_bw, "--vram-bw"),
    }
    asked = _Asked.read(readable.path, scheme_name, config)
    machine = _machine(asked, config, rates)
    made = plan_model(asked.spec, asked.schemes, asked.ctx, config, machine)
    if as_json:
        print(json.dumps({"model": readable.name, "ctx": asked.ctx, **made.to_dict()}, indent=2))
    else:
        ui.show_plan(readable.name, asked.ctx, made)


def _rate(text: str | None, name: str) -> float | None:
    return None if text is None else parse_bandwidth(text, f"`{name}`")


@dataclass(frozen=True)
class _Asked:
    """The model that a plan is asked for."""

    path: Path
    spec: "ModelFacts"
    schemes: tuple[QuantScheme, QuantScheme | None]  # of the experts and of the rest
    ctx: int

    @classmethod
    def read(cls, path: Path, scheme_name: str, config: EngineConfig) -> "_Asked":
        from moecli.engine import context_size
        from moecli.models.facts import read_facts

        spec = read_facts(store.config(path))
        return cls(path, spec, _schemes(path, scheme_name), context_size(config.ctx, spec))


def _machine(asked: _Asked, config: EngineConfig, rates: dict[str, float | None]) -> "Machine":
    """This machine at the given rates, where they are given; the others are measured."""
    import torch

    from moecli.footprint import expert_layout
    from moecli.measuring import with_compute
    from offload.hardware import detect

    machine = detect(asked.path, gpu=config.device != "cpu")
    if config.device == "cuda" and config.vram_nbytes is None:
        takes_card(config)  # or says that there is none
    stated: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    machine = replace(machine, **stated)
    if machine.gpu_name is not None or config.vram_nbytes is not None:
        machine = _described_card(machine)
    if machine.physical_cores is not None:
        torch.set_num_threads(machine.physical_cores)  # as a run does
    layout = expert_layout(asked.spec, asked.schemes[0])
    machine = with_compute(machine, layout, asked.spec.experts_per_token)
    if machine.disk_bw is None:
        machine = replace(machine, disk_bw=_disk_bandwidth(asked.path))
    return machine


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


def _disk_bandwidth(path: Path) -> float | None:
    from offload.bandwidth import measure_disk

    # A file is read, a directory written to: never write into somebody's checkpoint.
    largest = max(path.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)
    return None if largest is None else measure_disk(largest).bytes_per_s


def _schemes(path: Path, scheme_name: str) -> tuple[QuantScheme, QuantScheme | None]:
    """Of the experts and of the rest: what the manifest says, else what was asked for."""
    if not store.is_model(path):
        return QuantScheme.parse(scheme_name), store.DEFAULT_DENSE_SCHEME
    manifest = store.manifest(path)
    dense = manifest.get("dense_scheme")
    return (
        QuantScheme.parse(str(manifest.get("scheme"))),
        None if dense is None else QuantScheme.parse(str(dense)),
    )
