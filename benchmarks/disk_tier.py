"""How much of the disk's bandwidth a run gets whose experts are three times its memory.

    python benchmarks/disk_tier.py WORK_DIR [--rounds N] [--parts engine asked] [--json FILE]

Writes two models of made-up weights to WORK_DIR (7.4 GB), with the experts of Qwen3-30B-A3B (2.65
MB, 8 of 128 a token) and of Llama 4 Scout (70.8 MB, 1 of 16). `engine` runs them as `moecli bench`
does; `asked` has the manager asked by a router that chooses at random, computing being a sleep. The
ceiling is plain direct reads of experts at random places, whole or in pieces, by as many threads as
do best. All is measured in turns, round by round; a ratio compares figures of the same round.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.disk import asked, engine
from benchmarks.made_up import qwen3_config, write_model

MODELS = {
    "Qwen3-30B-A3B": qwen3_config(8, 2048, 768, 128, 8, 32, 4),
    "Scout": qwen3_config(4, 5120, 8192, 16, 1, 40, 8),
}


def main() -> None:
    options = _parser().parse_args()
    results: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        results = json.loads(options.json.read_text())  # of the part that is not run now
    for part in options.parts:
        title = _title(part, options.most_bw)
        results[title] = {"load": os.getloadavg()[0], "models": []}
        for name in options.models:
            path = write_model(options.work / name.lower(), MODELS[name])
            found = _measure(part, name, path, options)
            results[title]["models"].append(found)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=["engine", "asked"], default=["engine"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, help="of the engine; else one a physical core")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512], help="in tokens")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer")
    parser.add_argument(
        "--most-bw", type=float, help="bytes a second that the disk is to give the engine at most"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def _title(part: str, most_bw: float | None) -> str:
    """Under which the figures are kept: those of a slower disk beside those of this one."""
    if part == "engine" and most_bw is not None:
        return f"{part}, disk of {most_bw / 1e9:g} GB/s"
    return part


def _measure(part: str, name: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    if part == "engine":
        settings = engine.Settings(
            *(options.rounds, options.threads, options.most_bw),
            *(tuple(options.prompts), options.new_tokens),
        )
        found = engine.measure(name, path, settings)
        text = engine.table(found)
    else:
        rows, ceilings = asked.measure(name, path, options.rounds)
        found = {"model": name, "ceiling_gb_s": ceilings, "rows": [asdict(row) for row in rows]}
        text = asked.table(rows)
    depths = ", ".join(f"{way}: {value:.2f}" for way, value in found["ceiling_gb_s"].items())
    print(f"{name}: GB/s by threads and bytes at once: {depths}\n{text}", flush=True)
    return found


if __name__ == "__main__":
    main()
