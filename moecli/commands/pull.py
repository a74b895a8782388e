"""Knows what `moecli pull` takes and says; moecli.hub downloads."""

from typing import Annotated

import typer

from moecli import options, ui
from moecli.errors import MoecliError
from moecli.terminal import say
from moecli.units import format_nbytes

HELP = """Download a model of the hub into the cache that all tools share.

Only what a model needs comes: safetensors, config, tokenizer, templates, licences. What a kill has
left is taken up, and checked. To quantize, nothing need be pulled before: `moecli quantize` reads
the hub too, and needs far less of the disk."""
EXAMPLES = """
moecli pull Qwen/Qwen3-30B-A3B
moecli pull meta-llama/Llama-4-Scout-17B-16E-Instruct --dry-run
moecli pull Qwen/Qwen3-30B-A3B --revision main --quiet
"""


def pull(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A repository of the hub: `org/name`.")
    ] = None,
    model_flag: options.ModelOption = None,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    quiet: Annotated[bool, options.option("--quiet", help="Print the path, say nothing.")] = False,
) -> None:
    name = options.require_model(ctx, model, model_flag)
    from moecli.hub.client import Caller, is_hub_id
    from moecli.hub.pulling import check_space, plan_pull
    from moecli.hub.pulling import pull as pull_model

    if not is_hub_id(name):
        raise MoecliError(
            f"`{name}` is no repository of the hub", "it is written `org/name`", exit_code=2
        )
    caller = Caller(_ignore if quiet else ui.show_note)
    if dry_run:
        wanted = plan_pull(name, revision, caller)
        for file in wanted.files:
            here = "" if file in wanted.missing else "\there already"
            print(f"{file.nbytes}\t{file.name}{here}")
        say(f"{format_nbytes(wanted.missing_nbytes)} of {format_nbytes(wanted.nbytes)} to download")
        check_space(wanted)
        return
    try:
        with ui.pull_progress(quiet) as progress:
            path = pull_model(name, revision, progress, caller)
    except KeyboardInterrupt:
        say("stopped; what has arrived is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    print(path)
    if not quiet:
        say(f"next: moecli quantize {name}")


def _ignore(message: str) -> None:
    """With --quiet: a failure is told, what was mended is not."""
