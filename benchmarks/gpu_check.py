"""Everything that only a graphics card can show, in one run of at most eight minutes.

    PYTHONPATH=. python3 benchmarks/gpu_check.py [--tiny] [--json FILE] [--only SECTION ...]

Writes one JSON, after every part anew; docs/gpu.md says how to read it. Each section runs in a
process of its own with a budget of seconds: what fails, hangs or comes too late is recorded, and
the next section starts. `--tiny` does all of it in tiny sizes on the processor, to prove the
script; its figures mean nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import FORMAT, Section, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
_GRACE_S = 20.0  # kept back for a part that was begun in time, and for leaving
_TAIL = 2000  # characters of a section's last words


@dataclass(frozen=True)
class Options:
    """How this run was asked for. `found`: results of the sections before."""

    tiny: bool
    found: dict[str, Any]


Measure = Callable[[Section, Options], None]


def _build(section: Section, options: Options) -> None:
    from benchmarks.gpu import build

    build.measure(section, options.tiny)


def _machine(section: Section, options: Options) -> None:
    from benchmarks.gpu import machine

    machine.measure(section, options.tiny)


def _exactness(section: Section, options: Options) -> None:
    from benchmarks.gpu import exactness

    exactness.measure(section, options.tiny)


def _kernels(section: Section, options: Options) -> None:
    from benchmarks.gpu import kernels

    kernels.measure(section, options.tiny, options.found)


def _decode(section: Section, options: Options) -> None:
    from benchmarks.gpu import decode

    decode.measure(section, options.tiny, options.found)


def _peer(section: Section, options: Options) -> None:
    from benchmarks.gpu import peer

    peer.measure(section, options.tiny, options.found)


SECTIONS: dict[str, tuple[Measure, float]] = {  # and its share of the time, if all take theirs
    "build": (_build, 0.05),
    "machine": (_machine, 0.07),
    "exactness": (_exactness, 0.21),
    "kernels": (_kernels, 0.13),
    "decode": (_decode, 0.43),
    "peer": (_peer, 0.11),
}


def run_here(name: str, budget_s: float, tiny: bool, path: Path, found: dict[str, Any]) -> None:
    """One section in this process; its JSON goes to `path`."""
    begin = {"status": "running", "budget_s": budget_s, "parts": {}}
    write_json(path, begin)

    def save(data: dict[str, Any]) -> None:
        write_json(path, {"status": "running", **data})

    section = Section(budget_s, save)
    try:
        SECTIONS[name][0](section, Options(tiny, found))
    except Exception as error:  # noqa: BLE001 - the sections behind it go on
        text = f"{type(error).__name__}: {error}"
        write_json(path, {"status": "failed", "error": text, **section.to_dict()})
        return
    write_json(path, {"status": "ok", **section.to_dict()})


def run_apart(command: Sequence[str], timeout_s: float, path: Path) -> dict[str, Any]:
    """What a section left in `path`, however its process ended."""
    error = None
    begin = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=timeout_s)
            if process.returncode:
                tail = said.decode(errors="replace")[-_TAIL:]
                error = f"the process ended with {process.returncode}: {tail}"
        except subprocess.TimeoutExpired:
            error = f"ended after {timeout_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # its own children must not disturb what follows
                os.killpg(process.pid, signal.SIGKILL)
    result = read_json(path) or {"status": "running", "parts": {}}
    if error is not None or result["status"] == "running":
        result |= {"status": "failed", "error": error or "it left without a word"}
    return result | {"process_s": round(time.monotonic() - begin, 3)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All sections that were asked for; the report is on disk after each."""
    end = time.monotonic() + args.budget
    report: dict[str, Any] = {
        "format": FORMAT,
        "tiny": args.tiny,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "budget_s": args.budget,
        "sections": {},
    }
    part = args.json.with_name(args.json.name + ".section")
    names = list(args.only or SECTIONS)
    for number, name in enumerate(names):
        part.unlink(missing_ok=True)
        budget = _budget(names[number:], end - _GRACE_S - time.monotonic())
        print(f"{name}: at most {max(0.0, budget):.0f} s", file=sys.stderr, flush=True)
        if budget <= 0:
            report["sections"][name] = {"status": "skipped", "parts": {}}
        elif args.in_process:
            run_here(name, budget, args.tiny, part, report["sections"])
            report["sections"][name] = read_json(part)
        else:
            command = _command(name, budget, args, part)
            timeout = min(budget + _GRACE_S, end - time.monotonic())
            report["sections"][name] = run_apart(command, timeout, part)
        write_json(args.json, report)
    part.unlink(missing_ok=True)
    return report


def _budget(names: Sequence[str], left_s: float) -> float:
    """Seconds for the first of the sections still to come: what others left over is shared too."""
    return left_s * SECTIONS[names[0]][1] / sum(SECTIONS[name][1] for name in names)


def _command(name: str, budget: float, args: argparse.Namespace, part: Path) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
    command += ["--budget", f"{budget:.1f}", "--json", str(part), "--found", str(args.json)]
    return [*command, "--tiny"] if args.tiny else command


def _commit() -> str:
    command = ("git", "rev-parse", "HEAD")
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(report: dict[str, Any]) -> list[str]:
    """A line a section, and one for each part that did not go well."""
    lines = []
    for name, section in report["sections"].items():
        parts = section["parts"]
        good = sum(part["status"] == "ok" for part in parts.values())
        lines.append(f"{name}: {section['status']}, {good} of {len(parts)} parts")
        if "error" in section:
            lines.append(f"  {section['error']}")
        for key, part in parts.items():
            if part["status"] != "ok":
                reason = part.get("error") or part.get("reason", "")
                lines.append(f"  {key}: {part['status']}: {reason}")
    return lines


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/gpu_check.json")
    found.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    found.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections")
    found.add_argument("--tiny", action="store_true", help="tiny sizes on the processor")
    found.add_argument("--in-process", action="store_true", help="no process for each section")
    found.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    found.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if args.section:
        found = read_json(args.found).get("sections", {}) if args.found else {}
        run_here(args.section, args.budget, args.tiny, args.json, found)
        return 0
    report = run(args)
    print("\n".join(summary(report)), file=sys.stderr)
    print(args.json)
    return 0 if all(s["status"] == "ok" for s in report["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
