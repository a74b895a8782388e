"""Knows how the kernels for the processor are compiled before anything measures them."""

import functools
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.report import Section

ROOT = Path(__file__).resolve().parents[2]
MODULE = "quant.kernels.cpu.build"


def measure(section: Section, tiny: bool) -> None:
    """Where it fails, plain PyTorch does the processor's part, and the rest goes on."""
    source = ROOT / MODULE.replace(".", "/")
    if tiny:
        section.skip("processor_kernels", "a trial takes what is there")
    elif not source.with_suffix(".py").is_file():
        section.skip("processor_kernels", "there are none to build")
    else:
        section.part("processor_kernels", functools.partial(build, MODULE, section.left_s))


def build(module: str, timeout_s: float) -> dict[str, float]:
    """Seconds that it took. Raises with what the compiler said."""
    begin = time.perf_counter()
    done = subprocess.run(
        (sys.executable, "-m", module),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-1000:]}")
    return {"seconds": time.perf_counter() - begin}
