"""Knows what `moecli rm` asks before it deletes."""

import sys
from typing import Annotated

import typer

from moecli import options, store, ui
from moecli.errors import MoecliError
from moecli.terminal import is_terminal, say
from moecli.units import format_nbytes

HELP = """Delete a model from the store.

It asks first on a terminal; without one it needs `-y`. Directories outside the store are left
alone."""
EXAMPLES = """
moecli rm demo-int4-g32
moecli rm -y demo-int4-g32
"""


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name from `moecli list`.")],
    yes: options.Yes = False,
) -> None:
    path = store.removable(name)
    size = format_nbytes(store.disk_nbytes(path))
    if not yes:
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise MoecliError(
                f"`{path.name}` ({size}) is not deleted without being asked about",
                f"`moecli rm -y {path.name}` deletes it",
            )
        if not ui.ask(f"delete `{path.name}` ({size})?"):
            say("kept")
            raise typer.Exit(1)
    store.remove(path)
    say(f"deleted `{path.name}`, {size}")
