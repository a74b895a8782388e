"""Knows what `moecli quantize` takes and says; moecli.conversion does it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import options, store, ui
from moecli.errors import MoecliError
from moecli.hub.client import Caller, is_hub_id
from moecli.settings import parse_int
from moecli.terminal import say
from moecli.units import format_bandwidth, format_nbytes, format_wait, parse_bandwidth
from quant.scheme import QuantScheme

if TYPE_CHECKING:
    from moecli.schemes import AskedScheme, Schemes
    from quant.job import ConversionJob, ConversionResult

HELP = """Quantize the experts of a checkpoint to INT4 or INT8.

MODEL is a repository of the hub (`org/name`), a directory in Hugging Face's form, or `demo` for the
embedded one. A repository that was not pulled is quantized while it downloads: the disk needs room
for the result and one of its files. Peak memory stays small; Ctrl-C keeps what is finished, and the
same command goes on from there.

Its weights have 16 bits, or are packed already: by bitsandbytes, compressed-tensors (moecli's own
results too), FP8, MXFP4, GPTQ or AWQ. Then errors add up: prefer the 16-bit model where there is
one."""
EXAMPLES = """
moecli quantize Qwen/Qwen3-30B-A3B
moecli quantize ~/models/Llama-4-Scout-17B-16E-Instruct -q int4 -o scout-int4
moecli quantize ./Qwen3-30B-A3B -q int8 --group-size 64 --dense none
"""


def quantize(
    ctx: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    scheme_name: Annotated[
        str,
        options.option("-q", "--scheme", metavar="NAME", help="Of the experts: int4 or int8."),
    ] = "int4",
    group_size: Annotated[
        str | None,
        options.option(
            "--group-size",
            metavar="N",
            help="Weights that share a scale: 32, 64 or 128. Default: 32 in int4, 128 in int8 or "
            "what the model's rows divide by.",
        ),
    ] = None,
    dense_name: Annotated[
        str,
        options.option(
            "--dense",
            metavar="NAME",
            help="Of attention, shared experts and head: int8, int4 or none (16 bits).",
        ),
    ] = "int8",
    output: Annotated[
        Path | None,
        options.option(
            "-o", "--output", metavar="DIR", help="Where to write; else a name of the store."
        ),
    ] = None,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    rate: Annotated[
        str | None,
        options.option(
            "--rate", metavar="RATE", help="With --dry-run: the hub is read at `50MB/s`."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    name = options.require_model(ctx, model, model_flag)
    from moecli.schemes import AskedScheme

    groups = None if group_size is None else parse_int(group_size, "`--group-size`")
    of_experts = AskedScheme.parse(scheme_name, groups)
    of_rest = None if dense_name.lower() == "none" else AskedScheme.parse(dense_name)
    source = _Source.find(name, revision)
    scheme, dense_scheme = source.schemes(of_experts, of_rest)
    out = store.default_output(source.name, scheme) if output is None else output.expanduser()
    if out.exists():
        raise MoecliError(
            f"`{out}` exists already",
            f"`moecli chat {_called(out)}` uses it; `-o DIR` writes another",
        )
    if dry_run:
        stated = None if rate is None else parse_bandwidth(rate, "`--rate`")
        _show_preview(source.job(out, scheme, dense_scheme), stated, as_json)
        return
    if output is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ui.conversion_progress() as progress:
            result = source.quantize(out, scheme, dense_scheme, progress)
    except KeyboardInterrupt:
        say("stopped; finished work is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    ui.show_conversion(result, _called(out))
    if as_json:
        print(json.dumps(asdict(result), default=str, indent=2))


@dataclass(frozen=True)
class _Source:
    """What is to be quantized: a directory, or a repository of the hub that is not here whole."""

    path: Path | None
    repo_id: str = ""
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.repo_id.partition("/")[2] if self.path is None else store.model_name(self.path)

    @classmethod
    def find(cls, name: str, revision: str | None) -> "_Source":
        if is_hub_id(name) and not Path(name).exists():
            from moecli.hub.pulling import cached_model

            return cls(cached_model(name, revision), name, revision)
        if revision is not None:
            raise MoecliError(
                f"`{name}` is a directory and has no revisions",
                "leave out `--revision`",
                exit_code=2,
            )
        return cls(store.resolve_source(name))

    def schemes(self, experts: "AskedScheme", rest: "AskedScheme | None") -> "Schemes":
        """What this model takes of what is asked for."""
        from moecli.models.facts import read_facts

        spec = read_facts(self._config())
        return (
            experts.of(spec, experts=True, notify=ui.show_note),
            None if rest is None else rest.of(spec, experts=False, notify=ui.show_note),
        )

    def _config(self) -> dict[str, Any]:
        if self.path is not None:
            return store.config(self.path)
        from moecli.hub.pulling import look_at

        return store.config(look_at(self.repo_id, Caller(ui.show_note), self.revision)[0])

    def quantize(
        self,
        out: Path,
        scheme: QuantScheme,
        dense_scheme: QuantScheme | None,
        progress: "ui.ConversionShown",
    ) -> "ConversionResult":
        if self.path is not None:
            from moecli.conversion import quantize_model

            return quantize_model(
                self.path, out, scheme, dense_scheme, progress.update, ui.show_note
            )
        from moecli.conversion import quantize_from_hub

        caller = Caller(ui.show_note)
        return quantize_from_hub(
            *(self.repo_id, self.revision, out, scheme, dense_scheme, caller),
            *(progress.update, progress.arrived, ui.show_note),
        )

    def job(
        self, out: Path, scheme: QuantScheme, dense_scheme: QuantScheme | None
    ) -> "ConversionJob":
        """What `quantize` would do."""
        from moecli.conversion import hub_job, local_job

        if self.path is not None:
            return local_job(self.path, out, scheme, dense_scheme, ui.show_note)
        caller = Caller(ui.show_note)
        return hub_job(
            *(self.repo_id, self.revision, out, scheme, dense_scheme, caller),
            notify=ui.show_note,
        )


def _show_preview(job: "ConversionJob", rate: float | None, as_json: bool) -> None:
    from moecli.preview import preview

    seen = preview(job, rate)
    if as_json:
        print(json.dumps(asdict(seen), indent=2))
        return
    sizes = (
        ("source", seen.source_nbytes),
        ("download", seen.download_nbytes),
        ("result", seen.out_nbytes),
        ("disk at most", seen.peak_disk_nbytes),
        ("disk free", seen.free_disk_nbytes),
    )
    rates = [("quantizing", seen.quantize_rate)]
    if seen.network_rate is not None:
        rates.append(("network", seen.network_rate))
    bits = f"{seen.bpw:.2f} ({seen.bpw_experts:.2f} in experts)"
    if seen.source_form:
        ui.show_packed_source(seen.source_form)
    ui.show_pairs(
        [
            ("to be written", seen.out, seen.out),
            *((label, format_nbytes(size), str(size)) for label, size in sizes),
            ("bits a weight", bits, f"{seen.bpw}"),
            *((label, format_bandwidth(rate), f"{rate:.0f}") for label, rate in rates),
            ("time", f"{format_wait(seen.seconds)}, by {seen.bottleneck}", f"{seen.seconds:.1f}"),
        ]
    )


def _called(out: Path) -> str:
    """How the result is named in the next command."""
    return out.name if out.parent == store.models_dir() else str(out)
