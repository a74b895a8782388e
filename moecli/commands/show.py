"""Knows what `moecli show` says about one model: from its config and manifest, not its weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from moecli import options, store, ui
from moecli.hub.client import Caller, is_hub_id
from moecli.units import format_nbytes, format_params

HELP = """Show what a model is made of: layers, experts, parameters, schemes, sizes.

It reads config.json and moecli's own manifest, so it takes unquantized checkpoints too, and
repositories of the hub, of which it fetches these small files alone."""
EXAMPLES = """
moecli show demo
moecli show demo-int4-g32 --json
moecli show Qwen/Qwen3-30B-A3B
"""
_DECODERS = {
    "moecli": "moecli's own",
    "transformers": "transformers, with moecli's experts, on the processor",
}


@dataclass(frozen=True)
class ModelSummary:
    """Sizes in bytes, context in tokens; schemes by name, None where weights are as trained."""

    name: str
    path: str
    architecture: str
    num_params: int
    num_active_params: int
    num_layers: int
    num_moe_layers: int
    num_experts: int  # a layer
    experts_per_token: int
    shared_expert: bool
    max_context: int
    decoder: str  # whose forward pass runs it: moecli, or transformers with moecli's experts
    scheme: str | None
    quantized_here: bool  # by moecli: it can be run
    dense_scheme: str | None
    nbytes: int


def summarize(model: "Readable") -> ModelSummary:
    """Raises MoecliError for whatever is no MoE model that moecli knows."""
    from moecli.models.config import ModelSpec
    from moecli.models.facts import read_facts
    from moecli.models.hf_config import source_scheme

    path, config = model.path, store.config(model.path)
    spec = read_facts(config)
    manifest = store.manifest(path) if store.is_model(path) else {}
    return ModelSummary(
        name=model.name,
        path=str(path),
        architecture=spec.architecture,
        num_params=spec.num_params,
        num_active_params=spec.num_active_params,
        num_layers=spec.num_layers,
        num_moe_layers=len(spec.moe_layers),
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        shared_expert=spec.shared_intermediate_size > 0,
        max_context=spec.max_context,
        decoder="moecli" if isinstance(spec, ModelSpec) else "transformers",
        scheme=manifest["scheme"] if manifest else source_scheme(config),
        quantized_here=bool(manifest),
        dense_scheme=manifest.get("dense_scheme"),
        nbytes=model.nbytes,
    )


def show(
    ctx: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    as_json: options.Json = False,
) -> None:
    summary = summarize(Readable.find(options.require_model(ctx, model, model_flag)))
    if as_json:
        print(json.dumps(asdict(summary), indent=2))
    else:
        ui.show_pairs(_pairs(summary))


@dataclass(frozen=True)
class Readable:
    """A model that can be looked at: of one in the hub, config.json and index alone are here."""

    path: Path
    nbytes: int  # of all its files, wherever they are

    @property
    def name(self) -> str:
        return store.model_name(self.path)

    @classmethod
    def find(cls, name: str) -> "Readable":
        """As store.resolve, but the embedded model as it was trained where it is not quantized yet,
        and a repository of the hub where no directory is called so.
        """
        if is_hub_id(name) and not Path(name).exists():
            from moecli.hub.pulling import look_at

            return cls(*look_at(name, Caller(ui.show_note)))
        path = store.resolve(name)
        if name == store.DEMO and not store.is_model(path):
            path = store.demo_source()
        return cls(path, store.disk_nbytes(path))


def _pairs(summary: ModelSummary) -> list[tuple[str, str, str]]:
    """Label, value for people, value in full."""
    shared = " and a shared one" if summary.shared_expert else ""
    if summary.scheme is None:
        schemes = "none: as trained"
    elif not summary.quantized_here:
        schemes = f"{summary.scheme}, not by moecli"
    else:
        schemes = f"{summary.scheme} in experts, {summary.dense_scheme or '16 bits'} elsewhere"
    params, active = summary.num_params, summary.num_active_params
    layers = f"{summary.num_layers}, {summary.num_moe_layers} of them with experts"
    experts = f"{summary.num_experts} a layer, {summary.experts_per_token} a token{shared}"
    return [
        ("model", summary.name, summary.name),
        ("architecture", summary.architecture, summary.architecture),
        ("parameters", format_params(params), str(params)),
        ("active", f"{format_params(active)} a token", str(active)),
        ("layers", layers, layers),
        ("experts", experts, experts),
        ("context", f"{summary.max_context} tokens", str(summary.max_context)),
        ("decoder", _DECODERS[summary.decoder], summary.decoder),
        ("scheme", schemes, schemes),
        ("size", format_nbytes(summary.nbytes), str(summary.nbytes)),
        ("path", summary.path, summary.path),
    ]
