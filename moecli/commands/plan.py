"""Knows what `moecli plan` asks of offload.plan, and for which machine."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import known, options, store, ui
from moecli.card import takes_card
from moecli.commands.show import Readable
from moecli.config import EngineConfig
from moecli.errors import MoecliError
from moecli.hub.client import is_hub_id
from moecli.known import Known
from moecli.settings import Settings
from moecli.units import parse_bandwidth
from offload.errors import OffloadError
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from moecli.models.outline import Counted
    from moecli.plan_report import Subject
    from moecli.planning import Question, Schemes
    from offload.hardware import Machine
    from quant.layout import ExpertLayout

HELP = """Show what would lie where, and how fast bandwidth would let it run.

This is the placement that `run` and `chat` make. It reads config.json, no weights: a model of the
hub need not be downloaded. The budgets and
bandwidths may be those of another machine; what is not given is measured here, once, and kept:
`moecli doctor` measures anew. It also says what one more step would buy, and how many cards would
hold all. Exits with 1 where the model does not fit.

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
    as_json: options.Json = False,
) -> None:
    source = _Source.find(options.require_model(context, model, model_flag))
    config = Settings.read(**given).engine_config()
    rates = {
        "ram_bw": _rate(ram_bw, "--ram-bw"),
        "host_bw": _rate(cpu_bw, "--cpu-bw"),
        "disk_bw": _rate(disk_bw, "--disk"),
        "link_bw": _rate(link_bw, "--link"),
        "zero_copy_bw": _rate(link_bw, "--link"),
        "vram_bw": _rate(vram_bw, "--vram-bw"),
    }
    subject, asked = source.question(scheme_name, config, rates)
    from moecli.plan_report import make_report
    from moecli.plan_view import show_plan

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


@dataclass(frozen=True)
class _Source:
    """Where the config of a plan's model comes from: a directory, or what is built in."""

    name: str
    path: Path | None  # None: built in
    known: Known | None
    repo_id: str | None

    @classmethod
    def find(cls, name: str) -> "_Source":
        """Directories, the store and the hub go before what is built in."""
        spec, on_hub = known.find(name), is_hub_id(name)
        stored = store.is_model(store.models_dir() / name)
        if spec is not None and not (on_hub or stored or Path(name).exists()):
            return cls(spec.name, None, spec, spec.repo_id)
        try:
            readable = Readable.find(name)
        except MoecliError as error:
            raise MoecliError(error.message, _hint(name, spec, error.hint)) from error
        repo_id = name if on_hub and not Path(name).exists() else None
        return cls(readable.name, readable.path, None, repo_id)

    def config(self) -> dict[str, Any]:
        if self.path is not None:
            return store.config(self.path)
        assert self.known is not None, "a model from nowhere"
        return self.known.config()

    def question(
        self, scheme_name: str, config: EngineConfig, rates: dict[str, float | None]
    ) -> tuple["Subject", "Question"]:
        from moecli.engine import context_size
        from moecli.models.hf_outline import read_counted
        from moecli.planning import Question

        spec = read_counted(self.config())
        schemes = self._schemes(spec, scheme_name)
        ctx = context_size(config.ctx, spec)
        at = self.path or store.models_dir()
        machine = _machine(at, spec, schemes[0], config, rates)
        question = Question(spec, schemes, ctx, config, machine)
        return self._subject(spec, schemes[0]), question

    def _subject(self, spec: "Counted", scheme: QuantScheme) -> "Subject":
        from moecli.models.config import ModelSpec
        from moecli.plan_report import Subject

        title = self.name if self.known is None else f"{self.known.label}, a built-in spec"
        guessed = None if self.known is None else self.known.guessed
        source = self.repo_id
        if self.path is not None and source is None:
            source = store.DEMO if self.path == store.demo_source() else str(self.path)
        quantized = None
        if self.path is not None and store.is_model(self.path):
            source, quantized = None, str(self.path)
        elif isinstance(spec, ModelSpec) and source is not None:
            quantized = _short(store.default_output(source.rpartition("/")[2], scheme))
        return Subject(self.name, title, spec, source, quantized, guessed)

    def _schemes(self, spec: "Counted", scheme_name: str) -> "Schemes":
        """Of the experts and of the rest: what the manifest says, else what is asked for.

        Where no group is asked for it is narrowed to what divides the model's rows.
        """
        from moecli.footprint import fitting

        if self.path is None or not store.is_model(self.path):
            scheme = QuantScheme.parse(scheme_name)
            if scheme.name != scheme_name.lower():
                scheme = fitting(spec, scheme, experts=True)
            return scheme, fitting(spec, store.DEFAULT_DENSE_SCHEME, experts=False)
        manifest = store.manifest(self.path)
        dense = manifest.get("dense_scheme")
        return (
            QuantScheme.parse(str(manifest.get("scheme"))),
            None if dense is None else QuantScheme.parse(str(dense)),
        )


def _short(path: Path) -> str:
    """With `~`, as a shell reads it."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _hint(name: str, spec: Known | None, hint: str | None) -> str | None:
    """What else may be planned where a model is not to be had."""
    if spec is not None:
        return f"`moecli plan {spec.name}` needs no hub; or {hint}"
    close = known.close_to(name)
    if close and not is_hub_id(name) and not name.startswith((".", "/", "~")):
        return f"did you mean {' or '.join(f'`{each}`' for each in close)}?"
    return hint


def _machine(
    path: Path,
    spec: "Counted",
    scheme: QuantScheme,
    config: EngineConfig,
    rates: dict[str, float | None],
) -> "Machine":
    """This machine at the given rates, where they are given; the others are measured."""
    import torch

    from moecli.measuring import with_compute
    from offload.hardware import detect

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
    )
    if machine.disk_bw is None:
        machine = replace(machine, disk_bw=_disk_bandwidth(path))
    return machine


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


def _disk_bandwidth(path: Path) -> float | None:
    from offload.bandwidth import measure_disk

    # A file is read, a directory written to: never write into somebody's checkpoint.
    largest = max(path.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)
    return None if largest is None else measure_disk(largest).bytes_per_s
