"""Knows how the library of kernels for the processor is compiled, and imports nothing else of ours.

`python -m quant.kernels.cpu.build` compiles it where it belongs; `pip install` does the same. One
binary runs on every processor of an architecture: what needs newer instructions is compiled by
itself, and chosen when it is loaded.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "src"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY_NAME = f"libmoecli_cpu{_SUFFIX}"
LIBRARY = HERE / LIBRARY_NAME

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
    "-ffp-contract=off",  # a sum of contributions must not depend on where it is computed
)
_ASAN_FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_COMMON = ("api", "few_product", "isa", "layer", "linear", "moe", "pool", "router", "step")
_PORTABLE = {"kernels_portable": ()}
_X86 = {
    "kernels_avx2": _AVX2,
    "kernels_avxvnni": (*_AVX2, "-mavxvnni"),
    "kernels_avx512vnni": (
        *_AVX2,
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    ),
}
_ARM64 = {"kernels_neon": (), "kernels_dotprod": ("-march=armv8.2-a+dotprod",)}
_ARCHITECTURES = {"x86_64": ("MOECLI_X86", _X86), "arm64": ("MOECLI_ARM64", _ARM64)}


class BuildError(Exception):
    """There is no compiler, or it refused; the message holds what it said."""


def compiler() -> list[str]:
    """The command of a C++ compiler: that of CXX, or the first one found. Raises BuildError."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"there is no C++ compiler: {' '.join(asked) or 'c++, g++, clang++'}")


def build(target: Path = LIBRARY, *, asan: bool = False) -> Path:
    """Compile the library to `target`, which is replaced at once or not at all.

    A compiler that is too old for an instruction set leaves its kernels out, and stderr says so.
    """
    command = compiler()
    macro, offered = _ARCHITECTURES.get(_architecture(command), ("MOECLI_PORTABLE", {}))
    variants, without = _known(command, offered)
    common = (f"-D{macro}", *(f"-DMOECLI_WITHOUT_{name}" for name in without))
    units: dict[str, tuple[str, ...]] = {name: common for name in _COMMON}
    units |= _PORTABLE | variants
    flags = [*_FLAGS, *(_ASAN_FLAGS if asan else ())]
    with tempfile.TemporaryDirectory(dir=_directory(target)) as work:
        objects = [Path(work) / f"{name}.o" for name in units]

        def compile_unit(unit: tuple[Path, str, tuple[str, ...]]) -> None:
            output, name, own = unit
            source = SOURCES / f"{name}.cpp"
            _run([*command, *flags, *own, "-c", str(source), "-o", str(output)])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_unit, zip(objects, units, units.values(), strict=True)))
        linked = Path(work) / target.name
        extra = ["-fsanitize=address"] if asan else []
        if sys.platform == "linux" and not asan:
            extra += ["-static-libstdc++", "-static-libgcc"]
        _run([*command, "-shared", "-pthread", *extra, *map(str, objects), "-o", str(linked)])
        os.replace(linked, target)
    return target


def _architecture(command: list[str]) -> str:
    """What the compiler compiles for, which is another than this machine's when it crosses."""
    name = _run([*command, "-dumpmachine"]).split("-")[0].strip().lower()
    return {"amd64": "x86_64", "aarch64": "arm64"}.get(name, name)


def _known(
    command: list[str], variants: dict[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Those whose flags the compiler has heard of, and the names of the others, told on stderr."""
    known, without = {}, []
    for name, flags in variants.items():
        probe = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            known[name] = flags
            continue
        variant = name.removeprefix("kernels_")
        without.append(variant.upper())
        print(
            f"the kernels are built without {variant}: {' '.join(command)} does not know "
            f"{' '.join(flags)}; processors that have it use slower ones",
            file=sys.stderr,
        )
    return known, without


def _directory(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _run(command: list[str]) -> str:
    """What it says on stdout."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compile moecli's kernels for the processor.")
    parser.add_argument("target", type=Path, nargs="?", default=LIBRARY, help="instead of moecli's")
    parser.add_argument("--asan", action="store_true", help="with the address sanitizer")
    options = parser.parse_args(arguments)
    try:
        print(build(options.target, asan=options.asan))
    except BuildError as error:
        print(f"the kernels for the processor could not be compiled: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
