"""moecli beside llama.cpp on this processor: the same random weights, in alternation, one run.

    python benchmarks/vs_llama_cpp.py --peer-python PATH --work DIR [--json FILE]

PATH is the Python of a virtual environment with llama-cpp-python and gguf, whose source is built
for this processor; docs/performance.md says how to make it. DIR takes the models, some 14 to 40 GB
a shape, which are removed after it was measured unless `--keep` is given.

Both sides are processes that are told to decode or to read a prompt, one at a time, while the
other one sleeps. Each alternation also measures how fast memory is read. llama.cpp is measured
with weights repacked and as they are stored.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import plain, read_json, write_json
from benchmarks.llama.compare import MATCHES, Settings, Shop, compare
from benchmarks.llama.report import summarize, tables
from benchmarks.llama.shapes import SHAPES, TINY, Shape
from offload.hardware import detect

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    shapes = _chosen(options)
    settings = _settings(options)
    settings.work.mkdir(parents=True, exist_ok=True)
    matches = [match for match in MATCHES if match.ours.name in options.kinds]
    run = _machine(settings)
    report: dict[str, Any] = {"shapes": []}
    if options.json is not None and options.add:
        report = read_json(options.json) or report
    done = len(report["shapes"])
    for shape in shapes:
        shop = Shop(shape, settings)
        print(f"{shape.name}: making models", file=sys.stderr, flush=True)
        shop.make(matches)
        if options.make_only:
            continue
        found: dict[str, Any] = {"name": shape.name, "note": shape.note, "config": shape.config}
        report["shapes"].append({**found, "run": run, "comparisons": []})
        for match in matches:
            print(f"{shape.name}: measuring {match.ours.name}", file=sys.stderr, flush=True)
            comparison = compare(shop, match)
            comparison["summary"] = summarize(comparison)
            report["shapes"][-1]["comparisons"].append(plain(comparison))
            if options.json is not None:
                write_json(options.json, report)
        if not options.keep:
            shutil.rmtree(settings.work / shape.name)
    if not options.make_only:
        print(tables(report["shapes"][done:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("MOECLI_PEER_PYTHON"),
        help="Python with llama-cpp-python and gguf; else MOECLI_PEER_PYTHON",
    )
    parser.add_argument("--work", type=Path, required=True, help="where models are made")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--add", action="store_true", help="to what --json holds already")
    parser.add_argument("--shapes", nargs="+", help="some of them, by name")
    kinds = [match.ours.name for match in MATCHES]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=detect().physical_cores or 1)
    parser.add_argument("--kernels", default="auto", help="moecli's: see `moecli run -h`")
    parser.add_argument("--pp", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tg", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--keep", action="store_true", help="leave the models in --work")
    parser.add_argument("--make-only", action="store_true", help="measure nothing; implies --keep")
    parser.add_argument("--tiny", action="store_true", help="sizes that only try the script")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    if not options.peer_python:
        raise SystemExit("error: which Python has llama-cpp-python? give `--peer-python PATH`")
    return Settings(
        peer_python=options.peer_python,
        our_python=sys.executable,
        work=options.work,
        threads=options.threads,
        kernels=options.kernels,
        prompt_tokens=options.pp,
        new_tokens=options.tg,
        alternations=options.alternations,
        sequences=tuple(options.sequences),
    )


def _chosen(options: argparse.Namespace) -> list[Shape]:
    known = {shape.name: shape for shape in (TINY if options.tiny else SHAPES)}
    names = options.shapes or list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"error: no shape is called `{name}`; there are {', '.join(known)}")
    return [known[name] for name in names]


def _machine(settings: Settings) -> dict[str, Any]:
    import torch

    machine = detect()
    with settings.their_worker() as peer:
        versions = peer.ask("version")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": machine.cpu_name,
        "cores": machine.physical_cores,
        "isa": list(machine.isa),
        "ram_total": machine.ram_total,
        "system": platform.platform(),
        "torch": torch.__version__,
        "moecli": commit.stdout.strip(),
        "peer": versions,
        "threads": settings.threads,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "alternations": settings.alternations,
        "kernels": settings.kernels,
    }


if __name__ == "__main__":
    main()
