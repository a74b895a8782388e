"""Knows what `moecli plan` asks of offload.plan, and for which machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecli import options, store, ui
from moecli.commands.show import readable_directory
from moecli.config import EngineConfig
from moecli.errors import MoecliError
from moecli.settings import Settings
from moecli.units import parse_bandwidth
from offload.errors import OffloadError
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from offload.hardware import Machine
    from offload.plan import MemoryPlan, ModelFootprint

HELP = """Show what would lie where, and how fast bandwidth would let it run.

This is the placement that `run` and `chat` make. It reads config.json, no weights. The budgets and
bandwidths may be those of another machine; what is not given is measured here. Exits with 1 where
the model does not fit."""
EXAMPLES = """
moecli plan demo --ram 8MiB
moecli plan scout-int4 --ctx 32k
moecli plan ./Llama-4-Scout-17B-16E-Instruct -q int4 --ram 64GiB --ram-bw 60GB/s --disk 7GB/s
"""


def _bandwidth(name: str, help: str) -> object:
    return options.option(name, metavar="RATE", help=help)


def plan(
    ctx: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    ctx_tokens: options.Ctx = None,
    ram: options.Ram = None,
    vram: options.Vram = None,
    ram_bw: Annotated[str | None, _bandwidth("--ram-bw", "RAM is read at: `60GB/s`.")] = None,
    disk_bw: Annotated[str | None, _bandwidth("--disk", "The disk is read at: `7GB/s`.")] = None,
    link_bw: Annotated[
        str | None, _bandwidth("--link", "RAM reaches the graphics card at: `25GB/s`.")
    ] = None,
    scheme_name: Annotated[
        str,
        options.option(
            "-q", "--scheme", metavar="NAME", help="Where MODEL is not quantized yet: int4 or int8."
        ),
    ] = "int4",
    as_json: options.Json = False,
) -> None:
    path = readable_directory(options.require_model(ctx, model, model_flag))
    config = Settings.read(ctx=ctx_tokens, ram=ram, vram=vram).engine_config()
    machine = _machine(path, _rate(ram_bw, "--ram-bw"), _rate(disk_bw, "--disk"))
    machine = replace(machine, link_bw=_rate(link_bw, "--link"))
    ctx_size, made = _make(path, scheme_name, config, machine)
    if as_json:
        print(json.dumps({"model": path.name, "ctx": ctx_size, **made.to_dict()}, indent=2))
    else:
        ui.show_plan(path.name, ctx_size, made)


def _rate(text: str | None, name: str) -> float | None:
    return None if text is None else parse_bandwidth(text, f"`{name}`")


def _machine(path: Path, ram_bw: float | None, disk_bw: float | None) -> "Machine":
    """This machine, with the bandwidths that are not given measured."""
    from offload.bandwidth import measure_disk, measure_ram
    from offload.hardware import detect

    machine = detect(path)
    if ram_bw is None:
        ram_bw = measure_ram(machine.physical_cores or 1)
    if disk_bw is None:
        # A file is read, a directory written to: never write into somebody's checkpoint.
        largest = max(path.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)
        disk_bw = None if largest is None else measure_disk(largest).bytes_per_s
    return replace(machine, ram_bw=ram_bw, disk_bw=disk_bw)


def _make(
    path: Path, scheme_name: str, config: EngineConfig, machine: "Machine"
) -> tuple[int, "MemoryPlan"]:
    """(context, plan). Raises MoecliError with the largest context that fits, where one does."""
    from moecli.engine import context_size
    from moecli.footprint import model_footprint
    from moecli.models.config import ModelSpec
    from offload.plan import largest_context, make_plan

    spec = ModelSpec.from_hf(store.config(path))
    scheme, dense_scheme = _schemes(path, scheme_name)
    ctx = context_size(config.ctx, spec)
    budgets = config.ram_nbytes, config.vram_nbytes

    def footprint_at(tokens: int) -> "ModelFootprint":
        return model_footprint(spec, scheme, dense_scheme, tokens, config.prefill_chunk)

    try:
        return ctx, make_plan(footprint_at(ctx), machine, *budgets)
    except OffloadError as error:
        largest = largest_context(footprint_at, machine, ctx, *budgets)
        if largest is None:
            raise
        raise MoecliError(
            error.message, f"a context of {largest} tokens fits: `--ctx {largest}`"
        ) from error


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
