"""Knows what `moecli run` reads and prints; the engine answers."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecli import options, run_view
from moecli.answering import Answer, NoWriter, StreamWriter, stats_dict, stream_answer
from moecli.chat import Conversation
from moecli.commands.opening import model_directory, open_engine
from moecli.config import SamplingConfig
from moecli.errors import MoecliError
from moecli.markup import Plain
from moecli.settings import Settings
from moecli.terminal import is_terminal, say

if TYPE_CHECKING:
    from moecli.engine import Engine
    from moecli.vision.picture import Picture

HELP = """Answer one prompt: the answer, and nothing else, on stdout.

The prompt is what comes on stdin, then `-p`, then PROMPT, joined by blank lines.
Pictures come before it, or where a `--raw` one names <|image|>."""
EXAMPLES = """
moecli run demo "What is the capital of France?"
git diff | moecli run MODEL "Write a commit message."
moecli run MODEL -p "Once upon a time" --raw -n 200 --ram 16GiB -v
moecli run MODEL "What has changed?" --image old.png --image new.png --temp 0 --json
"""


@options.gathering(**options.SAMPLING, **options.ENGINE)
def run(
    context: typer.Context,
    model: options.Model = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to answer.")] = None,
    model_flag: options.ModelOption = None,
    prompt_flag: Annotated[
        str | None, options.option("-p", "--prompt", metavar="TEXT", help="What to answer.")
    ] = None,
    system: options.System = None,
    raw: Annotated[
        bool, options.option("--raw", help="Continue the text as it is: no chat template.")
    ] = False,
    images: Annotated[
        list[Path] | None,
        options.option("--image", metavar="FILE", help="A picture to see; may be repeated."),
    ] = None,
    *,
    given: dict[str, Any],
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    if options.typed(context, "model_flag") and model is not None and prompt is None:
        model, prompt = None, model  # -m MODEL PROMPT
    name = options.require_model(context, model, model_flag)
    settings = Settings.read(system=system, **given)
    if raw and settings.system and options.typed(context, "system"):
        raise MoecliError("`--raw` takes no system prompt", "leave out `--raw`", exit_code=2)
    text = _join_prompt(_read_stdin(), prompt_flag, prompt)
    settings.sampling_config({})  # complains before the model is opened
    _answer(name, text, images or [], settings, raw, as_json, verbose)


def _answer(
    name: str,
    text: str,
    images: list[Path],
    settings: Settings,
    raw: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    directory = model_directory(name)
    pictures = _read_pictures(directory, images)  # complains before the model is opened
    config = replace(settings.engine_config(), pictures=bool(pictures))  # room for experts, else
    with open_engine(directory, config) as engine:
        sampling: SamplingConfig = settings.sampling_config(engine.generation_config)
        session = engine.new_session()
        if raw:
            token_ids = engine.encode_text(text, pictures)
            splitter = Plain().splitter(text)
        else:
            conversation = Conversation(settings.system)
            conversation.ask(text, pictures)
            token_ids = engine.encode_chat(conversation.messages, session)
            splitter = engine.splitter(token_ids)
        answer = stream_answer(
            lambda cancelled: engine.generate(session, token_ids, sampling, cancelled, pictures),
            splitter,
            NoWriter() if as_json else StreamWriter(),
        )
        finished = answer.finished
        if as_json:
            _print_json(engine, answer, pictures)
        if verbose:
            run_view.show_timings(finished.stats, engine.plan)
            if engine.eye is not None and pictures:
                run_view.show_choices(engine.eye.choices())
    if finished.reason == "length" and answer.never_began:
        say("`-n` tokens were thought before the answer began; more of them let it begin")
    if finished.reason == "context":
        say("the answer ends here because the context is full; `--ctx` makes it longer")
    if finished.reason == "cancelled":
        raise typer.Exit(130)


def _read_pictures(directory: Path, images: list[Path]) -> "list[Picture]":
    if not images:
        return []
    from moecli.vision.picture import PictureReader

    reader = PictureReader.of(directory)
    return [reader.read(image) for image in images]


def _print_json(engine: "Engine", answer: Answer, pictures: "list[Picture]") -> None:
    from moecli.beside import beside

    finished = answer.finished
    content: dict[str, Any] = {
        "model": engine.path.name,
        "text": answer.text,
        "reasoning": answer.reasoning or None,
        "finish_reason": finished.reason,
        "stats": stats_dict(finished),
        "plan": engine.plan.to_dict(),
        "beside": asdict(beside(engine.plan, finished.stats)),
    }
    if engine.eye is not None and pictures:
        content["images"] = [picture.to_dict() for picture in pictures]
        content["expert_choices"] = asdict(engine.eye.choices())
    print(json.dumps(content, ensure_ascii=False, indent=2))


def _read_stdin() -> str | None:
    """What is piped in; None on a terminal. Raises MoecliError where it is not UTF-8."""
    if sys.stdin is None or is_terminal(sys.stdin):
        return None
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise MoecliError(
            f"the prompt on stdin is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}",
            "convert it first, for example with `iconv -f latin1 -t utf-8`",
        ) from error


def _join_prompt(*parts: str | None) -> str:
    given = [part for part in parts if part is not None]
    text = "\n\n".join(part for part in given if part.strip())
    if not text:
        raise MoecliError(
            "the prompt is empty", '`moecli run MODEL "..."`, or pipe it in', 1 if given else 2
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # arguments that were not UTF-8 arrive so
        raise MoecliError(f"the prompt is not UTF-8 at character {error.start}") from error
    return text
