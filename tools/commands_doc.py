"""Makes docs/commands.md of the help pages; a test holds it current.

COLUMNS=80 python tools/commands_doc.py > docs/commands.md
"""

import contextlib
import io

from moecli.cli import app, run_app


def page(*args: str) -> str:
    """One help page in a code block."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_app([*args, "-h"]) == 0, args
    return f"```\n{out.getvalue()}```\n"


def document() -> str:
    names = [command.name for command in app.registered_commands if not command.hidden]
    return "# Commands\n\n" + "\n".join([page(), *(page(str(name)) for name in names)])


if __name__ == "__main__":
    print(document(), end="")
