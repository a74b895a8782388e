"""The compiled kernels for ARM processors: crossed, and run by qemu, against plain loops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quant.kernels.cpu.build import SOURCES

ROOT = Path(__file__).parents[2]
COMPILER, RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian has the libraries of that compiler

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(RUNNER)),
    reason=f"needs {COMPILER} and {RUNNER}: packages g++-aarch64-linux-gnu and qemu-user",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cpu_products.cpp, with the library compiled as an install would on such a machine."""
    folder = tmp_path_factory.mktemp("arm")
    library, out = folder / "libmoecli_cpu.so", folder / "products"
    made = [sys.executable, "-m", "quant.kernels.cpu.build", str(library)]
    subprocess.run(made, cwd=ROOT, env={**os.environ, "CXX": COMPILER}, check=True)
    source = Path(__file__).with_name("cpu_products.cpp")
    flags = ["-std=c++17", "-O2", f"-I{SOURCES}", str(source), str(library)]
    linked = [COMPILER, *flags, f"-Wl,-rpath,{folder}", "-o", str(out)]
    subprocess.run(linked, check=True)
    return out


def results(program: Path, processor: str) -> dict[str, list[str]]:
    """What the program prints of each variant, fastest first."""
    command = [RUNNER, "-cpu", processor, "-L", SYSTEM, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: numbers for name, *numbers in rows}


def test_every_variant_computes_what_plain_loops_do(program: Path) -> None:
    found = results(program, "max")
    assert list(found) == ["dotprod", "neon", "portable"]
    for product, layer, weights, _ in found.values():
        assert 0 < float(product) < 0.006  # of a result's length: what 8-bit activations cost
        assert 0 < float(layer) < 0.015
        assert 0 < float(weights) < 0.08  # half of them have 4 bits
    assert found["dotprod"] == found["neon"], "the integers are the same"
    assert found["neon"][-1] == found["portable"][-1], "other weights were found"


def test_a_processor_without_dot_products_does_without_them(program: Path) -> None:
    assert list(results(program, "cortex-a53")) == ["neon", "portable"]
