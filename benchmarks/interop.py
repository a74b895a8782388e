"""Real vLLM serves what moecli wrote, and says the tokens that transformers says.

    python benchmarks/interop.py --vllm-python PATH --work DIR [--json FILE] [--resume]

`make interop` makes PATH, an environment with vLLM for processors, and runs this. Tiny random
models, and the embedded one, are quantized by moecli in several schemes; each run starts vLLM in
processes of its own. Its build for processors lacks kernels that its build for GPUs has: a run
with `lent` kernels borrows those of benchmarks/engines/plain_kernels.py, computes in fp32, and so
tests all that vLLM does with a checkpoint but its multiplying. A run with those of `zentorch` has
vLLM believe that the processor is one of AMD's (benchmarks/engines/zen.py).
"""

import argparse
import hashlib
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines.reference import Reference
from benchmarks.engines.tiny import FAMILIES, VOCAB, write_model
from benchmarks.engines.verdict import compare
from benchmarks.engines.vllm_run import Refused, Vllm, kernels_taken
from benchmarks.gpu.report import plain, read_json, write_json
from moecli.conversion import local_job
from offload.hardware import detect
from quant.convert import convert
from quant.scheme import QuantScheme

PROMPTS, NEW_TOKENS = (5, 17, 60, 150), 32  # the last one crosses a border of Llama 4's chunks
SCHEMES = {  # of experts and of dense linears, as `moecli quantize` takes them
    "int4 (default)": [],
    "int4, dense 16 bits": ["--dense", "none"],
    "int4, dense int4": ["--dense", "int4"],
    "int4-g128": ["-q", "int4-g128"],
    "int8": ["-q", "int8"],
}


@dataclass(frozen=True)
class Run:
    """One start of vLLM."""

    model: str
    scheme: str
    kernels: str = "own"  # lent, or zentorch: see benchmarks.engines.vllm_run
    ranks: int = 1  # tensor parallel
    expert_parallel: bool = False
    server: bool = False

    @property
    def dtype(self) -> str:
        return "float32" if self.kernels == "lent" else "bfloat16"

    @property
    def engine(self) -> dict[str, Any]:
        found: dict[str, Any] = {"dtype": self.dtype}
        if self.ranks > 1:
            found["tensor_parallel_size"] = self.ranks
        if self.expert_parallel:
            found["enable_expert_parallel"] = True
        return found

    @property
    def name(self) -> str:
        more = [f"{self.kernels} kernels", f"TP {self.ranks}"]
        more += ["expert parallel"] * self.expert_parallel + ["server"] * self.server
        return f"{self.model}, {self.scheme}, {', '.join(more)}"


def all_runs() -> list[Run]:
    """What decides most comes first."""
    default, dense16, *others = SCHEMES
    zen, both = "zentorch", ("qwen3_moe", "mixtral")
    runs = [Run(family, default, "lent") for family in FAMILIES]
    runs += [Run(family, dense16, zen) for family in FAMILIES]
    for family in FAMILIES:
        runs += [Run(family, default, "lent", 2), Run(family, dense16, zen, 2)]
        runs += [Run(family, default, "lent", 2, expert_parallel=True)]
    runs += [Run(family, "int8", "lent", 2) for family in FAMILIES]
    runs += [Run(family, dense16, zen, 2, expert_parallel=True) for family in both]
    runs += [Run("demo", default, "lent"), Run("demo", default, "lent", server=True)]
    runs += [Run(family, scheme, "lent") for family in FAMILIES for scheme in others]
    runs += [Run("tied qwen3_moe", default, "lent"), Run("sharded qwen3_moe", default, "lent")]
    runs += [Run(family, "int4, dense int4", zen) for family in both]
    runs += [Run("qwen3_moe", scheme, zen) for scheme in (default, "int4-g128", "int8")]
    runs += [Run("llama4", default, zen), Run("qwen3_moe", dense16)]
    runs += [Run("qwen3_moe", dense16, zen, server=True)]
    return [*runs, Run("qwen3_moe", default, "lent", 2, server=True)]


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that vLLM's processes end too
    report = _report(options)
    for run in all_runs():
        wanted = any(text in run.name for text in options.only)
        if run.ranks not in options.ranks or not wanted or run.name in report["runs"]:
            continue
        found = _try(run, options)
        report["runs"][run.name] = plain(found)
        print(f"{run.name}: {found['verdict']}", file=sys.stderr, flush=True)
        if options.json:
            write_json(options.json, report)
    print(table(report["runs"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm-python", type=Path, required=True, help="of vLLM's environment")
    parser.add_argument("--work", type=Path, required=True, help="where models are made")
    parser.add_argument("--json", type=Path, help="write results there, after each run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="only runs over these")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="runs named so")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --json has of these very scripts"
    )
    return parser


def _report(options: argparse.Namespace) -> dict[str, Any]:
    """Nothing yet, or what an earlier call has found: never of two versions of the scripts."""
    earlier = (options.resume and options.json and read_json(options.json)) or {}
    scripts = script_version()
    runs = earlier["runs"] if earlier.get("scripts") == scripts else {}
    about = {"machine": _machine(), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    return {**about, "scripts": scripts, "runs": runs}


def script_version() -> str:
    """Changes with this file and those of benchmarks/engines."""
    here = Path(__file__).resolve()
    files = [here, *sorted((here.parent / "engines").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "processor": detect().cpu_name,
        "cores": os.cpu_count(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "python": platform.python_version(),
    }


def _try(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    model = _quantized(run, options.work)
    vllm = Vllm(options.vllm_python.absolute(), options.work, run.kernels, run.engine)
    prompts = _prompts()
    found: dict[str, Any] = asdict(run) | {"dtype": run.dtype}
    try:
        said = (vllm.served if run.server else vllm.answers)(model, prompts, NEW_TOKENS)
    except Refused as refused:
        return found | {"verdict": "refused", "error": str(refused), "why": refused.reasons}
    reference = Reference.load(model)
    answers = said.pop("answers")
    log = (options.work / ("server.txt" if run.server else "log.txt")).read_text()
    comparison = compare(reference, run.dtype, prompts, answers)
    return found | comparison.to_dict() | said | {"kernels_taken": kernels_taken(log)}


def _prompts() -> list[list[int]]:
    """Random tokens, the same in every run, below the special ones."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB - 20, (n,), generator=generator).tolist() for n in PROMPTS]


def _quantized(run: Run, work: Path) -> Path:
    """What `moecli quantize` makes of the run's model, once."""
    models = work / "models"
    models.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in f"{run.model} {run.scheme}")
    if (models / name).exists():
        return models / name
    kind, _, family = run.model.rpartition(" ")
    source = "demo"
    if run.model != "demo":
        changes = {"tie_word_embeddings": True} if kind == "tied" else {}
        source = str(write_model(family, models / run.model.replace(" ", "-"), **changes))
    if kind == "sharded":
        job = local_job(Path(source), models / name, QuantScheme(4, 32), QuantScheme(8, 128))
        return convert(replace(job, shard_nbytes=1 << 20)).out
    program = str(Path(sys.executable).with_name("moecli"))
    command = [program, "quantize", source, *SCHEMES[run.scheme], "-o", str(models / name)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return models / name


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line a run, for people."""
    lines = [
        "| run | dtype | verdict | mean (max) error of log probabilities |",
        "|---|---|---|---|",
    ]
    for name, run in runs.items():
        error = ""
        if run.get("logprob_error_mean") is not None:
            error = f"{run['logprob_error_mean']:.2g} ({run['logprob_error_max']:.2g})"
        verdict = run["verdict"]
        if verdict == "refused":
            verdict += ": " + run["error"].splitlines()[0][:90]
        lines.append(f"| {name} | {run['dtype']} | {verdict} | {error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
