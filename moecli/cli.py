"""Knows the commands and how a failure becomes an exit code; imports nothing heavy."""

import os
import sys
from typing import Annotated

import typer

from moecli import __version__, ui
from moecli.commands import bench, chat, doctor, listing, plan, pull, quantize, rm, run, show
from moecli.errors import MoecliError
from moecli.helptext import HelpfulCommand, HelpfulGroup
from moecli.options import debugging
from offload.errors import OffloadError
from quant.errors import QuantError

HELP = """Run Mixture-of-Experts language models that do not fit the graphics card.

Every option has a name in the environment: `--top-p` is MOECLI_TOP_P. Settings may also stand in
~/.config/moecli/config.toml, by the names of their flags."""
EXAMPLES = """
moecli chat                                    talk to the embedded model
moecli quantize ./Qwen3-30B-A3B -q int4        make a checkpoint fit
moecli run MODEL "Why is the sky blue?"        one answer
moecli plan MODEL --ram 16GiB                  what would lie where
"""

app = typer.Typer(
    cls=HelpfulGroup,
    help=HELP,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moecli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def _add(name: str, function: object, help: str, examples: str, hidden: bool = False) -> None:
    app.command(name, cls=HelpfulCommand, help=help, epilog=examples, hidden=hidden)(function)  # type: ignore[type-var]


_add("pull", pull.pull, pull.HELP, pull.EXAMPLES)
_add("plan", plan.plan, plan.HELP, plan.EXAMPLES)
_add("quantize", quantize.quantize, quantize.HELP, quantize.EXAMPLES)
_add("run", run.run, run.HELP, run.EXAMPLES)
_add("chat", chat.chat, chat.HELP, chat.EXAMPLES)
_add("list", listing.list_models, listing.HELP, listing.EXAMPLES)
_add("ls", listing.list_models, listing.HELP, listing.EXAMPLES, hidden=True)
_add("show", show.show, show.HELP, show.EXAMPLES)
_add("rm", rm.rm, rm.HELP, rm.EXAMPLES)
_add("bench", bench.bench, bench.HELP, bench.EXAMPLES)
_add("doctor", doctor.doctor, doctor.HELP, doctor.EXAMPLES)


def run_app(args: list[str]) -> int:
    """Run one command line; returns its exit code, with every failure told on stderr.

    0 done, 1 failed for a reason the user can act on (or ours, said so), 2 usage, 130 Ctrl-C.
    """
    try:
        code = app(args, prog_name="moecli", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Whoever read us has gone: be quiet, at the interpreter's own last flush too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (MoecliError, QuantError, OffloadError, typer.TyperException, OSError) as error:
        _trace()
        return _report(error)
    except Exception as error:  # noqa: BLE001
        _trace()
        ui.show_error(
            f"internal error: {type(error).__name__}: {error}",
            None if debugging() else "this is a bug in moecli; MOECLI_DEBUG=1 shows where",
        )
        return 1


def _trace() -> None:
    """Show where it failed, to whoever asked for it."""
    if debugging():
        import traceback

        traceback.print_exc()


def _report(error: Exception) -> int:
    match error:
        case MoecliError() | QuantError() | OffloadError():
            ui.show_error(error.message, error.hint)
            return getattr(error, "exit_code", 1)
        case typer.TyperException():  # what Typer says of the command line
            message = error.format_message().rstrip(".")
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "moecli"
            ui.show_error(message[:1].lower() + message[1:], f"`{command} -h` shows how it is used")
            return error.exit_code
        case OSError():
            where = f": `{error.filename}`" if error.filename else ""
            ui.show_error(f"{error.strerror or error}{where}", None)
            return 1
    raise AssertionError(f"no report for {type(error).__name__}")


def main() -> None:
    """The `moecli` command."""
    sys.exit(run_app(sys.argv[1:]))
