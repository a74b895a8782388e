"""How the kernels for the processor are compiled where the compiler is an old one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Stands for a compiler: refuses a flag, notes what it was asked, and writes empty files.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
for word in "$@"; do
    [ "$word" = "{refused}" ] && exit 1
    [ "$before" = "-o" ] && : > "$word"
    before="$word"
done
exit 0
"""


def build(folder: Path, refused: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the build said, and the commands that it gave."""
    compiler, log = folder / "compiler", folder / "log"
    compiler.write_text(COMPILER.format(log=log, refused=refused))
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


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 has variants"
)
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


def test_what_every_compiler_must_know_still_fails_the_build(tmp_path: Path) -> None:
    done, _ = build(tmp_path, "-std=c++17")
    assert done.returncode == 1
    assert "could not be compiled" in done.stderr
