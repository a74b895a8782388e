"""moecli's conversion beside llama.cpp's: the same bf16 weights, in alternation, one run.

    python benchmarks/quantize_speed.py --peer-python PATH --work DIR [--out DIR] [--json FILE]

Both read a whole model that lies in the page cache, make 4 bits of it on as many threads and write
it to `--out`: moecli to INT4 with its search for scales, attention and head to INT8, by the same
call as `moecli quantize`; llama.cpp to Q4_0 by the function behind `llama-quantize`. moecli's time
includes checksums and fsync, which llama.cpp's does not. What a copy of the same bytes takes is
measured beside them: the source read, the result written, with fsync and without.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu.report import write_json
from benchmarks.llama.naming import tensors
from benchmarks.llama.numbers import Numbers
from benchmarks.llama.shapes import SHAPES, TINY, Shape
from benchmarks.llama.workers import Worker
from moecli.conversion import quantize_model
from offload.hardware import detect
from offload.load import busy_seconds
from quant.scheme import QuantScheme

PEER = "benchmarks.llama.peer_worker"
_BLOCK_NBYTES = 16 << 20


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not options.peer_python:
        raise SystemExit("error: which Python has llama-cpp-python? give `--peer-python PATH`")
    shape = (TINY if options.tiny else SHAPES)[0]
    config = {**shape.config, "num_hidden_layers": options.layers}
    options.work.mkdir(parents=True, exist_ok=True)
    out = options.out or options.work
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    with Worker(options.peer_python, PEER, options.work / "peer.log") as peer:
        report = _described(options, shape, peer)
        source, gguf = options.work / "source", options.work / "bf16.gguf"
        _make(source, gguf, config, shape, peer)
        if options.make_only:
            return
        report["source_nbytes"] = _nbytes(source)
        report["gguf_nbytes"] = gguf.stat().st_size
        report["rounds"] = [
            _round(source, gguf, out, peer, options.threads) for _ in range(options.alternations)
        ]
    report["summary"] = summarize(report)
    if options.json is not None:
        write_json(options.json, report)
    print(table(report))
    if not options.keep:
        shutil.rmtree(options.work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("MOECLI_PEER_PYTHON"),
        help="Python with llama-cpp-python and gguf; else MOECLI_PEER_PYTHON",
    )
    parser.add_argument("--work", type=Path, required=True, help="for the models; removed after")
    parser.add_argument("--out", type=Path, help="for what is written; else --work")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--layers", type=int, default=2, help="of Qwen3-30B-A3B: 1.3 GB each")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=detect().physical_cores or 1)
    parser.add_argument("--keep", action="store_true", help="leave the models in --work")
    parser.add_argument("--make-only", action="store_true", help="measure nothing; implies --keep")
    parser.add_argument("--tiny", action="store_true", help="sizes that only try the script")
    return parser


def _described(options: argparse.Namespace, shape: Shape, peer: Worker) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": shape.name,
        "layers": options.layers,
        "processor": detect().cpu_name,
        "threads": options.threads,
        "written_to_memory": options.out is not None and str(options.out).startswith("/dev/shm"),
        "torch": torch.__version__,
        "peer": peer.ask("version"),
    }


def _make(source: Path, gguf: Path, config: dict[str, Any], shape: Shape, peer: Worker) -> None:
    """The same weights as safetensors and as GGUF, once."""
    if not gguf.exists():
        peer.ask("write", arch=shape.arch, config=config, path=str(gguf))
    if (source / "config.json").exists():
        return
    source.mkdir()
    numbers = Numbers()
    weights = {
        tensor.hf: torch.from_numpy(numbers.bf16(tensor).view("int16")).view(torch.bfloat16)
        for tensor in tensors(config)
    }
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _round(source: Path, gguf: Path, out: Path, peer: Worker, threads: int) -> dict[str, Any]:
    """Seconds of each, and the cores that others kept busy meanwhile."""
    ours, theirs, copied = out / "ours", out / "theirs.gguf", out / "copied"
    _read(source / "model.safetensors")
    begin, cpu = time.perf_counter(), time.process_time()
    busy = busy_seconds()
    result = quantize_model(source, ours, QuantScheme(4, 32), QuantScheme(8, 128))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    found = {
        "ours_s": seconds,
        "ours_cpu_s": cpu,
        "ours_foreign_cores": max(0.0, busy_seconds() - busy - cpu) / seconds,
        "ours_nbytes": result.out_nbytes,
    }
    shutil.rmtree(ours)
    _read(gguf)
    arguments = {"source": str(gguf), "out": str(theirs), "kind": "Q4_0", "pure": False}
    begin, cpu, busy = time.perf_counter(), peer.cpu_seconds(), busy_seconds()
    peer.ask("quantize", threads=threads, **arguments)
    seconds, cpu = time.perf_counter() - begin, peer.cpu_seconds() - cpu
    found["theirs_s"], found["theirs_cpu_s"] = seconds, cpu
    found["theirs_foreign_cores"] = max(0.0, busy_seconds() - busy - cpu) / seconds
    found["theirs_nbytes"] = theirs.stat().st_size
    theirs.unlink()
    found["read_s"] = _read(source / "model.safetensors")
    found["write_s"], found["write_fsync_s"] = _write(copied, result.out_nbytes)
    copied.unlink()
    return found


def _read(path: Path) -> float:
    """Seconds to read a file into the same memory over and over."""
    memory = bytearray(_BLOCK_NBYTES)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass
    return time.perf_counter() - begin


def _write(path: Path, nbytes: int) -> tuple[float, float]:
    """Seconds to write so much, and to have it on the disk."""
    block = os.urandom(_BLOCK_NBYTES)
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(0, nbytes, _BLOCK_NBYTES):
            file.write(block)
        written = time.perf_counter() - begin
        os.fsync(file.fileno())
    return written, time.perf_counter() - begin


def _nbytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def summarize(report: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds, in MB of bf16 source a second; the ratio is of each round."""
    rounds = report["rounds"]

    def rate(nbytes: int, *keys: str) -> float:
        return statistics.median(nbytes / 1e6 / sum(r[key] for key in keys) for r in rounds)

    source, gguf = report["source_nbytes"], report["gguf_nbytes"]
    return {
        "ours": rate(source, "ours_s"),
        "ours_a_core_second": rate(source, "ours_cpu_s"),
        "theirs": rate(gguf, "theirs_s"),
        "theirs_a_core_second": rate(gguf, "theirs_cpu_s"),
        "ratio": statistics.median((source / r["ours_s"]) / (gguf / r["theirs_s"]) for r in rounds),
        "least_ratio": min((source / r["ours_s"]) / (gguf / r["theirs_s"]) for r in rounds),
        "copy": rate(source, "read_s", "write_s"),
        "copy_fsync": rate(source, "read_s", "write_fsync_s"),
        "foreign_cores": max(
            max(r["ours_foreign_cores"], r["theirs_foreign_cores"]) for r in rounds
        ),
    }


def table(report: dict[str, Any]) -> str:
    found = report["summary"]
    rows = [
        ("moecli, INT4 searched, checksums and fsync", found["ours"], found["ours_a_core_second"]),
        ("llama.cpp, Q4_0", found["theirs"], found["theirs_a_core_second"]),
        ("copy of the same bytes, one thread", found["copy"], None),
        ("the same with fsync", found["copy_fsync"], None),
    ]
    lines = ["| | MB of bf16 a second | MB a second of processor time |", "|---|---|---|"]
    for name, rate, busy in rows:
        lines.append(f"| {name} | {rate:.0f} | {'' if busy is None else f'{busy:.0f}'} |")
    ratio = f"moecli / llama.cpp: {found['ratio']:.2f} (least {found['least_ratio']:.2f})"
    others = f"cores that others kept busy: at most {found['foreign_cores']:.2f}"
    return "\n".join([*lines, "", ratio, others])


if __name__ == "__main__":
    main()
