"""Knows what `moecli bench` asks for and how the numbers are written down; measures nothing."""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import options, ui
from moecli.commands.opening import model_directory, open_engine
from moecli.errors import MoecliError
from moecli.run_view import a_token
from moecli.settings import Settings, parse_int
from moecli.terminal import Interrupt
from moecli.units import format_nbytes, format_seconds, parse_count

if TYPE_CHECKING:
    from moecli.bench_result import BenchResult, BenchRow
    from moecli.bench_tests import BenchConfig

HELP = """Measure how fast a model reads prompts and writes answers on this machine.

pp512 is a prompt of 512 tokens, tg128 an answer of 128 tokens to a prompt of one. Cold: freshly
opened, after the system was asked to forget the files; warm: after a run that is not counted.
Prompts are random tokens, which is right for speed; which experts they ask for, and so the hit
rate, differs from text. Decoding is what `run` does, drawing tokens and their text included.

Read is what a token reads of weights, moved what came from disk or over the link for it. The
roofline is what the bandwidths of memory, measured in the same run, allow for these bytes."""
EXAMPLES = """
moecli bench demo
moecli bench MODEL --ram 16GiB --repeats 10 --json > bench.json
moecli bench MODEL --pp 2k --tg 64 --cold 0 --sequences 1,2,4,8 --md
"""
_HEADERS = (
    *("test", "experts", "tok/s", "from - to", "TTFT", "hits", "moved/token", "read/token"),
    "of roofline",
)


@options.gathering(**options.ENGINE)
def bench(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    prompt_tokens: Annotated[
        str, options.option("--pp", metavar="TOKENS", help="Length of the prompt, else 512.")
    ] = "512",
    new_tokens: Annotated[
        str, options.option("--tg", metavar="TOKENS", help="Length of the answer, else 128.")
    ] = "128",
    repeats: Annotated[
        str, options.option("--repeats", metavar="N", help="Warm runs of each test, else 5.")
    ] = "5",
    cold: Annotated[
        str, options.option("--cold", metavar="N", help="Cold runs, else 1; 0 for none.")
    ] = "1",
    sequences: Annotated[
        str,
        options.option(
            "--sequences",
            metavar="N,N",
            help="Also write so many answers at once, such as `1,2,4,8`; rates are of all.",
        ),
    ] = "",
    *,
    given: dict[str, Any],
    as_json: options.Json = False,
    markdown: Annotated[bool, options.option("--md", help="Print a table in Markdown.")] = False,
) -> None:
    name = options.require_model(context, model, model_flag)
    if as_json and markdown:
        raise MoecliError("`--json` and `--md` exclude each other", "give one", exit_code=2)
    settings = Settings.read(**given)
    settings.sampling_config({})  # complains before the model is opened
    result = _measure(name, settings, _asked(prompt_tokens, new_tokens, repeats, cold, sequences))
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    elif markdown:
        ui.print_markdown(_HEADERS, [_cells(row) for row in result.rows])
        print("\n" + "\n".join(f"- {label}: {shown}" for label, shown, _ in _pairs(result)))
    else:
        ui.show_table(_HEADERS, [_cells(row) for row in result.rows])
        ui.show_pairs(_pairs(result))


def _asked(pp: str, tg: str, repeats: str, cold: str, sequences: str) -> "BenchConfig":
    from moecli.bench_tests import BenchConfig

    counts = [part for part in sequences.split(",") if part.strip()]
    return BenchConfig(
        prompt_tokens=parse_count(pp, "`--pp`"),
        new_tokens=parse_count(tg, "`--tg`"),
        repeats=parse_int(repeats, "`--repeats`"),
        cold=parse_int(cold, "`--cold`"),
        sequences=tuple(parse_int(part, "`--sequences`") for part in counts),
    )


def _measure(name: str, settings: Settings, config: "BenchConfig") -> "BenchResult":
    from moecli.benchmarking import Subject, run_bench

    path = model_directory(name)
    engine_config = replace(settings.engine_config(), pictures=False)  # prompts are tokens of text
    subject = Subject(
        path,
        engine_config,
        lambda: open_engine(path, engine_config, keep_usage=False),  # tokens are random
        lambda engine: settings.sampling_config(engine.generation_config),
    )
    with Interrupt() as cancelled, ui.counting_line("measuring", "runs") as line:
        return run_bench(subject, config, cancelled, line.update)


def _cells(row: "BenchRow") -> list[tuple[str, str]]:
    """For people, and in full."""
    least, most = row.spread
    ttft, hits = row.median("ttft_s"), row.median("hit_rate")
    moved, read, share = row.median("moved_nbytes"), row.median("read_nbytes"), row.roofline_share
    return [
        (row.test, row.test),
        (row.slots, row.slots),
        (f"{row.tok_s:.1f}", str(row.tok_s)),
        (f"{least:.1f} - {most:.1f}", f"{least}\t{most}"),
        ("" if ttft is None else format_seconds(ttft), _full(ttft)),
        ("" if hits is None else f"{hits:.1%}", _full(hits)),
        ("" if moved is None else format_nbytes(moved), _full(moved)),
        ("" if read is None else format_nbytes(read), _full(read)),
        ("" if share is None else f"{share:.0%}", _full(share)),
    ]


def _full(value: float | None) -> str:
    return "" if value is None else str(value)


def _pairs(result: "BenchResult") -> list[tuple[str, str, str]]:
    """What holds of all tests: (label, for people, in full)."""
    plan = result.plan
    rates = {"RAM": result.ram_bw, "disk": result.disk_bw}
    if plan.on_device:
        rates |= {"link": result.link_bw, "VRAM": result.vram_bw}
    vram = result.peak_vram_nbytes
    peak = format_nbytes(result.peak_rss_nbytes)
    if vram is not None:
        peak += f" and {format_nbytes(vram)} of VRAM"
    kernels = f"{result.device}, kernels {result.kernels}, {result.threads} threads"
    beside = result.beside
    grown = beside.ram_nbytes.measured
    since = "" if grown is None else f", {format_nbytes(grown)} of RAM since the model was opened"
    each = (*beside.a_token.values(), beside.hit_rate)
    return [
        ("predicted", _predicted(result), _full(plan.predicted_tok_s)),
        (
            "a token",
            a_token(beside.a_token, beside.hit_rate),
            "\t".join(f"{_full(pair.measured)}\t{_full(pair.planned)}" for pair in each),
        ),
        ("experts", ui.places(plan), f"{plan.host_slots}\t{plan.total_experts}"),
        (
            "bandwidth",
            ", ".join(f"{name} {ui.bandwidth(rate)}" for name, rate in rates.items()),
            "\t".join(_full(rate) for rate in rates.values()),
        ),
        (
            "memory",
            f"peak {peak}{since}; the plan takes {ui.memory(plan)}",
            f"{result.peak_rss_nbytes}\t{_full(vram)}",
        ),
        ("computed by", kernels, f"{result.device}\t{result.kernels}\t{result.threads}"),
    ]


def _predicted(result: "BenchResult") -> str:
    """The plan's numbers beside what was measured."""
    plan, rate = result.plan, result.plan.predicted_tok_s
    if rate is None:
        return "unknown, as long as a bandwidth is"
    return f"{ui.at_most(rate, plan.bottleneck)}, measured {result.warm.tok_s:.1f}"
