"""Knows how a help page looks: usage, what it does, arguments, options, commands, examples.

Written by hand because Typer's own page either loads Rich, which costs half of the start, or
reflows the examples; and so that the page does not change with Typer's version.
"""

import inspect
import re
import shutil
import sys
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from moecli.terminal import bold

_COLUMN = 26  # where descriptions begin


class HelpfulCommand(TyperCommand):
    """A command with our help page; its epilog holds the examples, one a line."""

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]
        return _page(ctx)


class HelpfulGroup(TyperGroup):
    """The group of all commands, with our help page."""

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]
        return _page(ctx)


def _page(ctx: typer.Context) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    command: Any = ctx.command
    parts = [f"Usage: {ctx.command_path} {_usage(command, ctx)}"]
    parts.append(_paragraphs(command.help or "", width))
    params = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    arguments = [_argument(param) for param in params if param.param_type_name == "argument"]
    options = [_option(param) for param in params if param.param_type_name == "option"]
    parts.append(_table("Arguments", arguments, width))
    if isinstance(command, TyperGroup):
        commands = [(name, item) for name, item in command.commands.items() if not item.hidden]
        rows = [(name, _first_clause(item.help or "")) for name, item in commands]
        parts.append(_table("Commands", rows, width))
    parts.append(_table("Options", options, width))
    if command.epilog:
        examples = inspect.cleandoc(command.epilog)
        parts.append(f"{bold('Examples:', sys.stdout)}\n{textwrap.indent(examples, '  ')}")
    return "\n\n".join(part for part in parts if part)


def _usage(command: Any, ctx: typer.Context) -> str:
    if isinstance(command, TyperGroup):
        return "COMMAND [OPTIONS]"
    pieces = ["[OPTIONS]"]
    for param in command.get_params(ctx):
        if param.param_type_name == "argument" and not param.hidden:
            name = param.metavar or param.name.upper()
            pieces.append(name if param.required else f"[{name}]")
    return " ".join(pieces)


def _paragraphs(text: str, width: int) -> str:
    blocks = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(block.split()), width) for block in blocks)


def _first_clause(text: str) -> str:
    return re.split(r"[.;:,](?=\s|$)", text, maxsplit=1)[0]


def _argument(param: Any) -> tuple[str, str]:
    return param.metavar or param.name.upper(), param.help or ""


def _option(param: Any) -> tuple[str, str]:
    names = sorted([*param.opts, *param.secondary_opts], key=len)
    short = [name for name in names if not name.startswith("--")]
    long = [name for name in names if name.startswith("--")]
    text = ", ".join(short + long) if short else "    " + ", ".join(long)
    return (f"{text} {param.metavar}" if param.metavar else text), param.help or ""


def _table(title: str, rows: list[tuple[str, str]], width: int) -> str:
    if not rows:
        return ""
    lines = [bold(f"{title}:", sys.stdout)]
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - _COLUMN, 24)) or [""]
        if len(name) + 4 > _COLUMN:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{_COLUMN - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * _COLUMN + line for line in wrapped]
    return "\n".join(lines)
