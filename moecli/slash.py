"""Knows the commands inside a chat: `/name argument`. Messages go to stderr."""

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moecli import options, run_view, ui
from moecli.chat import Conversation
from moecli.config import SamplingConfig
from moecli.errors import MoecliError
from moecli.settings import parse_float, parse_int
from moecli.talk import Talk
from moecli.terminal import say
from moecli.units import parse_count


class Leave(Exception):
    """The person wants to leave the chat."""


@dataclass(frozen=True)
class Command:
    """`usage` shows the argument; `run` gets the talk and the argument, stripped."""

    usage: str
    about: str
    run: Callable[[Talk, str], None]


def run_command(talk: Talk, line: str) -> None:
    """Raises MoecliError for a command that is unknown or fails, Leave for one that leaves."""
    name, _, argument = line.partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, _COMMANDS, 1)
        hint = f"did you mean `{close[0]}`? /help lists all" if close else "/help lists all"
        raise MoecliError(f"there is no command `{name}`", hint)
    command.run(talk, argument.strip())


def _help(talk: Talk, argument: str) -> None:
    width = max(len(command.usage) for command in _COMMANDS.values())
    shown = {command.usage: command.about for command in _COMMANDS.values()}
    for usage, about in shown.items():
        say(f"  {usage.ljust(width)}  {about}")
    say(f"  {chr(34) * 3:{width}}  begins and ends a message of many lines")
    say(f"  {'Ctrl-C':{width}}  stops an answer and keeps what is written; Ctrl-D leaves")


def _exit(talk: Talk, argument: str) -> None:
    raise Leave


def _clear(talk: Talk, argument: str) -> None:
    talk.restart(Conversation(talk.conversation.system))
    say("cleared; the system prompt stays")


def _system(talk: Talk, argument: str) -> None:
    if not argument:
        say(talk.conversation.system or "no system prompt; /system TEXT sets one")
    elif argument == "none":
        talk.conversation.system = None
        say("no system prompt from now on")
    else:
        talk.conversation.system = argument
        say("system prompt set; what was said so far stays")


_SETTABLE: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "temp": ("temperature", parse_float),
    "top_p": ("top_p", parse_float),
    "top_k": ("top_k", parse_int),
    "min_p": ("min_p", parse_float),
    "seed": ("seed", parse_int),
    "max_tokens": ("max_tokens", parse_count),
}
_FIXED = {name: f"--{name.replace('_', '-')}" for name in options.ENGINE}


def _set(talk: Talk, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        for setting, (field, _parse) in _SETTABLE.items():
            current = getattr(talk.sampling, field)
            say(f"  {setting:<10}  {'none' if current is None else current}")
        return
    if name in _FIXED:
        raise MoecliError(
            f"`{name}` is fixed once the model is open", f"leave, and give `{_FIXED[name]}`"
        )
    if name not in _SETTABLE:
        raise MoecliError(f"there is no setting `{name}`", f"there are {', '.join(_SETTABLE)}")
    if not value:
        raise MoecliError(f"`{name}` is to be set to what?", f"for example `/set {name} 1`")
    field, parse = _SETTABLE[name]
    free = SamplingConfig.__dataclass_fields__[field].default is None and value == "none"
    change: dict[str, Any] = {field: None if free else parse(value, f"`{name}`")}
    talk.sampling = replace(talk.sampling, **change)
    say(f"{name} = {value}")


def _file(argument: str, example: str = "/save chat.json") -> Path:
    if not argument:
        raise MoecliError("the name of the file is missing", f"for example `{example}`")
    return Path(argument).expanduser()


def _save(talk: Talk, argument: str) -> None:
    path = _file(argument)
    talk.conversation.save(path, talk.model)
    say(f"saved {_answers(talk)} to `{path}`")


def _load(talk: Talk, argument: str) -> None:
    path = _file(argument)
    talk.restart(Conversation.load(path, talk.look))
    say(f"loaded {_answers(talk)} from `{path}`")


def _answers(talk: Talk) -> str:
    count = talk.conversation.num_answers
    return f"{count} answer" if count == 1 else f"{count} answers"


def _regen(talk: Talk, argument: str) -> None:
    talk.regenerate()


def _read(talk: Talk, argument: str) -> None:
    path = _file(argument)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise MoecliError(f"cannot read `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MoecliError(f"`{path}` is not UTF-8 text: byte {error.start}") from error
    talk.attached.append(text.rstrip("\n"))
    say(f"`{path}`, {len(text)} characters, goes before your next message")


def _image(talk: Talk, argument: str) -> None:
    if argument == "none":
        talk.pictures.clear()
        say("no picture goes with your next message")
        return
    path = _file(argument, "/image photo.jpg")
    picture = talk.look(path)
    talk.pictures.append(picture)
    (width, height), (rows, columns) = picture.size, picture.grid
    tiles = "one tile" if rows * columns == 1 else f"{rows} x {columns} tiles and one of all"
    say(
        f"`{path}`, {width} x {height} pixels in {tiles}, {picture.num_tokens} tokens, goes before "
        "your next message"
    )


def _stats(talk: Talk, argument: str) -> None:
    if talk.last is not None:
        run_view.show_timings(talk.last, talk.engine.plan)
    if talk.engine.eye is not None:
        run_view.show_choices(talk.engine.eye.choices())
    for label, value in talk.facts():
        say(f"{label:<9}{value}")


def _show(talk: Talk, argument: str) -> None:
    plan = talk.engine.plan
    say(f"model    {talk.engine.path}")
    say(f"experts  {ui.places(plan)}")
    say(f"memory   {ui.memory(plan)}")
    every = asdict(talk.sampling).items()
    settings = {name: value for name, value in every if value is not None and value is not False}
    say(f"sampling {', '.join(f'{name} {value}' for name, value in settings.items())}")


_EXIT = Command("/exit, /bye, /quit", "leave", _exit)
_COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/clear": Command("/clear", "forget what was said", _clear),
    "/system": Command("/system [TEXT]", "show or set the system prompt, or `none`", _system),
    "/set": Command("/set [NAME VALUE]", "show or set temp, top_p, top_k, min_p, ...", _set),
    "/regen": Command("/regen", "answer the last question anew", _regen),
    "/read": Command("/read FILE", "put a text file before the next message", _read),
    "/image": Command("/image FILE", "show a picture with the next message; `none`: none", _image),
    "/save": Command("/save FILE", "keep the conversation in a file", _save),
    "/load": Command("/load FILE", "go on with a conversation that was kept", _load),
    "/stats": Command("/stats", "what the last answer and the experts cost", _stats),
    "/show": Command("/show", "the model, its place in memory, the settings", _show),
    "/exit": _EXIT,
    "/bye": _EXIT,
    "/quit": _EXIT,
}
