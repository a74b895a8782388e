"""Knows the loop of `moecli chat`: read, act, answer, until the person leaves."""

from typing import TYPE_CHECKING, Any

import typer

from moecli import __version__, options, run_view, store, ui
from moecli.commands.opening import model_directory, open_engine
from moecli.errors import MoecliError
from moecli.lines import Lines, open_lines, read_message
from moecli.settings import Settings
from moecli.slash import Leave, run_command
from moecli.talk import Talk
from moecli.terminal import say
from moecli.units import format_params
from offload.errors import OffloadError
from quant.errors import QuantError

if TYPE_CHECKING:
    from moecli.engine import Engine

HELP = """Talk to a model; without MODEL to the embedded one, which is quantized on first use.

Answers go to stdout, all else to stderr. In the chat /help lists the commands."""
EXAMPLES = """
moecli chat
moecli chat scout-int4 --ram 24GiB -s "Answer in one sentence."
moecli chat demo --temp 0 < questions.txt > answers.txt
"""


@options.gathering(**options.SAMPLING, **options.ENGINE)
def chat(
    context: typer.Context,
    model: options.Model = None,
    model_flag: options.ModelOption = None,
    system: options.System = None,
    *,
    given: dict[str, Any],
) -> None:
    name = options.one_model(context, model, model_flag) or store.DEMO
    settings = Settings.read(system=system, **given)
    settings.sampling_config({})  # complains before the model is opened
    with open_engine(model_directory(name), settings.engine_config()) as engine:
        sampling = settings.sampling_config(engine.generation_config)
        talk = Talk(engine, sampling, settings.system)
        lines = open_lines(store.state_home() / "history")
        if lines.interactive:
            ui.show_chat_header(__version__, _header(engine))
        try:
            _loop(talk, lines)
        finally:
            lines.close()


def _header(engine: "Engine") -> list[str]:
    spec, plan = engine.spec, engine.plan
    params = format_params(spec.num_params)
    return [
        engine.path.name,
        f"{spec.architecture}, {params} parameters, "
        f"{format_params(spec.num_active_params)} active a token",
        f"context {engine.ctx} tokens · {ui.places(plan)} · {ui.memory(plan)}",
        '/help for commands · """ for many lines · Ctrl-C stops an answer · Ctrl-D leaves',
    ]


def _loop(talk: Talk, lines: Lines) -> None:
    while True:
        try:
            message = read_message(lines)
        except EOFError:
            if lines.interactive:
                say("")
            return
        except KeyboardInterrupt:
            if not lines.interactive:
                raise
            say("\nCtrl-D or /exit leaves")
            continue
        except UnicodeDecodeError:
            say("that was not UTF-8; nothing was sent")
            continue
        try:
            _act(talk, lines, message)
        except Leave:
            return


def _act(talk: Talk, lines: Lines, message: str) -> None:
    """One message or command. A failure is told and the chat goes on; a pipe ends with it.

    A command that fails leaves the chat as it was, so that goes on in a pipe too.
    """
    before = talk.last
    try:
        if message.startswith("/"):
            run_command(talk, message)
        elif message.strip():
            talk.say(message)
    except (MoecliError, QuantError, OffloadError) as error:
        if not (lines.interactive or message.startswith("/")):
            raise
        ui.show_error(error.message, error.hint)
    except KeyboardInterrupt:
        if not lines.interactive:
            raise
        say("\nstopped")
    if lines.interactive and talk.last is not None and talk.last is not before:
        run_view.show_stats_line(talk.last, talk.engine.plan)
