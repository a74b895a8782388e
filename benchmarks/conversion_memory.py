"""What a conversion takes of memory and disk: of a checkpoint twenty times larger than its bound.

    python benchmarks/conversion_memory.py --work DIR [--times 20] [--json FILE]

The weights are layers of Qwen3-30B-A3B, all zeros, a layer a file. A file has room reserved on the
disk when it is needed and goes when it is done with, as one that is downloaded: so the disk holds
what it would hold of a real one. Exits with 1 where a bound is broken: 2 GiB of memory and one
expert, with Python and torch; on the disk the result and one file.
"""

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import write_json
from benchmarks.llama.naming import tensors
from benchmarks.llama.shapes import SHAPES, TINY
from moecli.conversion import local_job
from offload.hardware import detect, peak_rss_nbytes
from quant.checkpoint import INDEX_FILE
from quant.convert import convert
from quant.safetensors_file import build_header
from quant.scheme import QuantScheme
from quant.supply import AllThere, FileTurn

GIB = 1 << 30
SLACK_NBYTES = 4 << 20  # of the disk: config, journal, index, whole blocks


@dataclass(frozen=True)
class Reserved(AllThere):
    """The supply of files that are there as holes: real when they are needed, gone after that."""

    directory: Path
    takes_away = True

    def room_nbytes(self, turns: Sequence[FileTurn]) -> int:
        return max(((self.directory / turn.name).stat().st_size for turn in turns), default=0)

    def take(self, name: str) -> None:
        with (self.directory / name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)

    def release(self, name: str) -> None:
        (self.directory / name).unlink()


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    shape = (TINY if options.tiny else SHAPES)[0]
    expert = 3 * 2 * shape.config["hidden_size"] * shape.config["moe_intermediate_size"]
    bound = options.bound + expert
    layer = expert * shape.config["num_experts"]
    layers = math.ceil(options.times * bound / layer)
    config = {**shape.config, "num_hidden_layers": layers}
    work: Path = options.work
    work.mkdir(parents=True)
    try:
        source_nbytes, largest = write_holes(work / "source", config)
        before = peak_rss_nbytes()
        job = local_job(work / "source", work / "out", QuantScheme(4, 32), QuantScheme(8, 128))
        job = replace(job, supply=Reserved(work / "source"))
        started = time.monotonic()
        with most_disk(work) as most:
            result = convert(job)
        report = {
            "shape": f"{layers} layers of {shape.name}",
            "processor": detect().cpu_name,
            "threads": torch.get_num_threads(),
            "source_nbytes": source_nbytes,
            "largest_file_nbytes": largest,
            "result_nbytes": result.out_nbytes,
            "memory_bound_nbytes": bound,
            "times_the_bound": source_nbytes / bound,
            "peak_rss_nbytes": peak_rss_nbytes(),
            "before_nbytes": before,  # of these, Python and torch
            "peak_disk_nbytes": most[0],
            "seconds": time.monotonic() - started,
        }
    finally:
        shutil.rmtree(work)
    if options.json is not None:
        write_json(options.json, report)
    print(json.dumps(report, indent=1))
    within = report["peak_rss_nbytes"] <= bound
    within &= report["peak_disk_nbytes"] <= result.out_nbytes + largest + SLACK_NBYTES
    return 0 if within else 1


def write_holes(path: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A checkpoint of holes, a layer a file; bytes of all files and of the largest."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors(config):
        parts = tensor.hf.split(".layers.")
        name = f"layer-{parts[1].split('.')[0]}" if len(parts) == 2 else "rest"
        files.setdefault(f"{name}.safetensors", {})[tensor.hf] = tuple(tensor.shape)
    path.mkdir()
    sizes = []
    for name, shapes in files.items():
        header, entries = build_header((n, torch.bfloat16, shape) for n, shape in shapes.items())
        with (path / name).open("wb") as file:
            file.write(header)
            file.truncate(max(entry.offset + entry.nbytes for entry in entries.values()))
            sizes.append(file.seek(0, os.SEEK_END))
    index = {tensor: name for name, shapes in files.items() for tensor in shapes}
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(sizes), max(sizes)


@contextmanager
def most_disk(path: Path) -> Iterator[list[int]]:
    """The most bytes that the files of a directory take of the disk meanwhile; holes take none."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], _disk_nbytes(path))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _disk_nbytes(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(Path(directory) / name).st_blocks * 512
            except FileNotFoundError:  # it was just let go
                continue
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="made, and removed after")
    parser.add_argument("--times", type=float, default=20, help="the bound, that the source has")
    parser.add_argument("--bound", type=int, default=2 * GIB, help="bytes, one expert on top")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--tiny", action="store_true", help="sizes that only try the script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
