"""How the kernels for the processor are compiled where the compiler is an old one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands for a compiler: refuses a flag, notes what it was asked, and writes empty files.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
[ "$1" = "-dumpmachine" ] && echo "{machine}"
for word in "$@"; do
    [ "$word" = "{refused}" ] && exit 1
    [ "$before" = "-o" ] && : > "$word"
    before="$word"
done
exit 0
"""


def build(
    folder: Path, refused: str, machine: str = "x86_64-linux-gnu"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the build said, and the commands that it gave to a compiler for a machine."""
    compiler, log = folder / "compiler", folder / "log"
    compiler.write_text(COMPILER.format(log=log, refused=refused, machine=machine))
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "quant.kernels.cpu.build", str(folder / "made.so")],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text().splitlines()


def test_a_compiler_that_does_not_know_an_instruction_set_leaves_its_kernels_out(
    tmp_path: Path,
) -> None:
    done, commands = build(tmp_path, "-mavxvnni")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.so").exists()
    assert "built without avxvnni" in done.stderr
    compiled = [command for command in commands if " -c " in command]
    assert not any("kernels_avxvnni.cpp" in command for command in compiled)
    assert any("kernels_avx512vnni.cpp" in command for command in compiled)
    isa = next(command for command in compiled if "isa.cpp" in command)
    assert "-DMOECLI_WITHOUT_AVXVNNI" in isa
    assert "WITHOUT_AVX512VNNI" not in isa


def test_a_compiler_that_knows_all_leaves_nothing_out(tmp_path: Path) -> None:
    done, commands = build(tmp_path, "-mnothing")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not any("WITHOUT" in command for command in commands)


@pytest.mark.parametrize("machine", ["aarch64-linux-gnu", "arm64-apple-darwin23.6.0"])
def test_what_is_compiled_is_for_the_machine_of_the_compiler(tmp_path: Path, machine: str) -> None:
    done, commands = build(tmp_path, "-march=armv8.2-a+dotprod", machine)
    assert done.returncode == 0, done.stderr
    assert "built without dotprod" in done.stderr
    compiled = "\n".join(command for command in commands if " -c " in command)
    assert "kernels_neon.cpp" in compiled
    assert "-DMOECLI_ARM64 -DMOECLI_WITHOUT_DOTPROD" in compiled
    for absent in ("kernels_dotprod.cpp", "kernels_avx2.cpp", "MOECLI_X86"):
        assert absent not in compiled


def test_a_machine_without_variants_of_its_own_gets_the_portable_ones(tmp_path: Path) -> None:
    done, commands = build(tmp_path, "-mnothing", "riscv64-linux-gnu")
    assert done.returncode == 0, done.stderr
    compiled = [command.split(" -c ")[1] for command in commands if " -c " in command]
    assert sum("/kernels_" in command for command in compiled) == 1


def test_what_every_compiler_must_know_still_fails_the_build(tmp_path: Path) -> None:
    done, _ = build(tmp_path, "-std=c++17")
    assert done.returncode == 1
    assert "could not be compiled" in done.stderr
