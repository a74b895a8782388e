"""Makes what docs/planning.md shows of `moecli plan`; a test holds it current.

python tools/planning_doc.py

A block of code that begins with `$ moecli plan ...` is followed by what that prints on a terminal
of 80 columns; the table after `<!-- specs ... -->` is made of the command's JSON. The machine is
the one that the command's options describe: nothing is measured.
"""

import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path
from unittest import mock

from moecli import known
from moecli.cli import run_app
from moecli.units import format_nbytes, format_params
from offload.hardware import Machine

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
_PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"}
_BLOCK = re.compile(r"(?<=```\n)\$ moecli (plan .*)\n(?:.*\n)*?(?=```)")
_TABLE = re.compile(r"(?<=<!-- specs: )(.*)( -->\n\n)(?:\|.*\n)+")
_LIMITS = {"link and cpu": "link, processor", "cpu": "processor", "ram": "RAM", "vram": "VRAM"}


class _Screen(io.StringIO):
    """Takes what is printed, as a terminal would."""

    def isatty(self) -> bool:
        return True


def document(page: str) -> str:
    """The page with all that the command says made anew."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOECLI_")}
    clean.pop("XDG_DATA_HOME", None)
    environment = mock.patch.dict(os.environ, clean | _PLAIN, clear=True)
    with environment, mock.patch("offload.hardware.detect", return_value=Machine()):
        page = _BLOCK.sub(lambda found: f"$ moecli {found[1]}\n{_shown(found[1])}", page)
        return _TABLE.sub(lambda found: found[1] + found[2] + _specs(found[1]), page)


def _run(arguments: str, out: io.StringIO) -> str:
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run_app(shlex.split(arguments))
    return err.getvalue()


def _shown(arguments: str) -> str:
    """What a person sees, errors last."""
    out = _Screen()
    err = _run(arguments, out)
    lines = (out.getvalue() + err).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _specs(machine: str) -> str:
    """One line a built-in spec, planned for one machine."""
    rows = [
        "| spec | parameters | of a token | int4 | KV cache | decode tok/s, at most | "
        "cards of 24, 48, 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *(_row(spec, machine) for spec in known.SPECS)]) + "\n"


def _row(spec: known.Known, machine: str) -> str:
    out = io.StringIO()
    err = _run(f"plan {spec.name} {machine} --json", out)
    fits = not err
    if err:  # then somewhere else, for what does not depend on the machine
        out = io.StringIO()
        err = _run(
            f"plan {spec.name} --device cpu --ram 8TiB --ram-bw 1TB/s --cpu-bw 1TB/s "
            "--disk 1GB/s --json",
            out,
        )
        assert not err, err
    plan = json.loads(out.getvalue())
    speed = "does not fit"
    if fits:
        limit = _LIMITS.get(plan["bottleneck"], plan["bottleneck"])
        speed = f"{plan['predicted_tok_s']:.1f} ({limit})"
    int4 = plan["holdings"][-1]
    cards = ", ".join(str(found["num_cards"]) for found in int4["cards"].values())
    return (
        f"| {spec.label} | {format_params(plan['num_params'])} "
        f"| {format_params(plan['num_active_params'])} | {format_nbytes(int4['nbytes'])} "
        f"| {format_nbytes(plan['kv_nbytes'])} | {speed} | {cards} |"
    )


if __name__ == "__main__":
    PAGE.write_text(document(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
