"""Knows what `moecli doctor` looks at: the machine, the packages, the places. Changes nothing."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moecli import __version__, options, settings, store, ui
from moecli.errors import MoecliError
from moecli.units import GIB, format_nbytes
from offload.errors import OffloadError

if TYPE_CHECKING:
    from moecli.selfcheck import SelfCheck
    from offload.hardware import Machine

HELP = """Check what moecli stands on: packages, processor, memory, disk, graphics card, places.

One line a check. How fast memory and disk are is measured once, in seconds, and kept for plans and
runs; with a graphics card also how much memory the system pins for it. What is measured while other
programs keep the processors busy is measured a few times more, and the most is kept. On a card
every kernel is compared with plain arithmetic, once; that takes up to a minute. `--refresh` does
both again. Exits with 1 where something is wrong."""
EXAMPLES = """
moecli doctor
moecli doctor --refresh
moecli doctor --json > report.json
"""
Refresh = Annotated[
    bool, options.option("--refresh", help="Measure again, and compare the card's kernels again.")
]
_LITTLE_RAM = 4 * GIB
_LITTLE_DISK = 20 * GIB
_PATHS = {  # what a fast path is called here, and what is done without it
    "kernels": ("GPU kernels", "plain PyTorch computes, slowly"),
    "graph": ("GPU graph", "each kernel is launched by itself, which costs time at every token"),
    "fetch": ("GPU fetch", "experts that VRAM does not hold are never brought there at decode"),
    "doorbell": ("GPU doorbell", "the processor takes no part in decoding"),
    "parts": ("GPU parts", "a prompt copies whole experts where VRAM has slices of them"),
}
_PACKAGES = ("torch", "transformers", "tokenizers", "typer", "rich")
_FAST_ISA = {"avx2", "asimd"}


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    status: Literal["ok", "warn", "error"]
    what: str
    found: str
    fix: str | None = None


def doctor(refresh: Refresh = False, as_json: options.Json = False) -> None:
    checks = list(all_checks(refresh))
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        ui.show_checks([(c.status, c.what, c.found, c.fix) for c in checks])
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def all_checks(refresh: bool = False) -> Iterator[Check]:
    """In the order of the report; each is found when it is asked for.

    `refresh`: what is remembered of this machine and its graphics card is found out anew.
    """
    from offload.hardware import detect

    yield Check("ok", "moecli", __version__)
    yield Check("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        yield _package(package)
    place = _existing(store.models_dir())
    machine = detect(place, gpu=True)
    yield _processor(machine)
    yield _kernels()
    yield _ram(machine)
    yield _disk(place, machine)
    yield from _bandwidths(place, machine, refresh)
    yield from _graphics(machine, refresh)
    yield Check("ok", "models", f"{len(store.models())} in {store.models_dir()}")
    yield _config_file()


def _package(name: str) -> Check:
    from importlib import metadata  # a third of the command's start, if it stood above

    try:
        return Check("ok", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(
            "error", name, "not installed", f"{Path(sys.executable).name} -m pip install {name}"
        )


def _processor(machine: "Machine") -> Check:
    found = f"{machine.cpu_name or 'unknown'}, cores: {machine.physical_cores or 'unknown'}"
    found += f", {' '.join(machine.isa) or 'no vector instructions known'}"
    if _FAST_ISA.isdisjoint(machine.isa):
        return Check("warn", "processor", found, "moecli will be slow without AVX2 or NEON")
    return Check("ok", "processor", found)


def _kernels() -> Check:
    from quant import ops
    from quant.errors import QuantError

    try:
        return Check("ok", "CPU kernels", f"compiled, {ops.cpu_isa()} is used")
    except QuantError as error:
        return Check("warn", "CPU kernels", error.message, error.hint)


def _ram(machine: "Machine") -> Check:
    total, available = machine.ram_total, machine.ram_available
    if total is None or available is None:
        return Check("warn", "RAM", "unknown", "give `--ram` with every command")
    found = f"{format_nbytes(total)}, {format_nbytes(available)} available"
    if available < _LITTLE_RAM:
        return Check("warn", "RAM", found, "close other programs before you open a large model")
    return Check("ok", "RAM", found)


def _disk(place: Path, machine: "Machine") -> Check:
    free = machine.disk_free
    found = "unknown" if free is None else f"{format_nbytes(free)} free at {place}"
    if not os.access(place, os.W_OK):
        return Check("error", "disk", f"{place} is not writable", "set MOECLI_HOME elsewhere")
    if free is None or free < _LITTLE_DISK:
        return Check("warn", "disk", found, "set MOECLI_HOME to a place with more room")
    return Check("ok", "disk", found)


def _bandwidths(place: Path, machine: "Machine", refresh: bool) -> Iterator[Check]:
    """Measured once, or anew where `refresh` asks for it: what other commands reckon with."""
    from offload.measured import disturbed, with_bandwidths

    found = with_bandwidths(machine, refresh=refresh, pinning=True)
    busy = disturbed(machine)
    yield _speed("RAM speed", found.ram_bw, "ram_bw" in busy)
    if machine.gpu_name is not None:
        yield _speed("VRAM speed", found.vram_bw, "vram_bw" in busy)
        yield _speed("link speed", found.link_bw, "link_bw" in busy)
        yield _speed("zero copy", found.zero_copy_bw, "zero_copy_bw" in busy)
        yield _pinned(found)
    try:
        disk = with_bandwidths(found, disk=place).disk_bw
    except OffloadError as error:
        yield Check("warn", "disk speed", error.message, error.hint)
        return
    yield _speed(
        "disk speed", disk, unknown="it is not read past memory here: say `--disk` to a plan"
    )


def _pinned(machine: "Machine") -> Check:
    """Of main memory that is not pinned, copies are slower and kernels of the card read nothing."""
    limit, available = machine.pinned_limit, machine.ram_available
    if not limit or available is None:
        fix = "the system pins less than 1 GiB; under WSL, `.wslconfig` says how much memory it has"
        return Check("warn", "pinned RAM", "none", fix)
    if limit + GIB > available // 2:
        return Check("ok", "pinned RAM", f"{format_nbytes(int(limit))} tried, and allowed")
    fix = "experts beyond it reach the card more slowly; under WSL about half of memory can be had"
    return Check("warn", "pinned RAM", f"{format_nbytes(int(limit))} at most", fix)


def _speed(what: str, found: float | None, busy: bool = False, unknown: str | None = None) -> Check:
    """`busy`: others kept the processors from this process meanwhile; `unknown`: why it may be."""
    if found is None:
        return Check("warn", what, ui.bandwidth(found), unknown)
    if busy:
        said = f"{ui.bandwidth(found)} at least"
        fix = "other programs were busy meanwhile; `moecli doctor --refresh` once they are not"
        return Check("warn", what, said, fix)
    return Check("ok", what, ui.bandwidth(found))


def _graphics(machine: "Machine", refresh: bool) -> Iterator[Check]:
    if machine.gpu_name is None:
        yield Check("ok", "graphics", "no CUDA device; everything runs on the processor")
        return
    found = machine.gpu_name
    if machine.vram_total is not None and machine.vram_free is not None:
        total, free = format_nbytes(machine.vram_total), format_nbytes(machine.vram_free)
        found += f", {total}, {free} free"
    if machine.gpu_driver is not None:
        found += f", driver {machine.gpu_driver}"
    yield Check("ok", "graphics", found)
    from moecli.selfcheck import self_check

    check = self_check(refresh, begin=lambda: ui.show_note("comparing kernels, a minute at most"))
    yield from (_fast_path(path, check) for path in _PATHS)


def _fast_path(path: str, check: "SelfCheck") -> Check:
    from moecli.selfcheck import why

    what, otherwise = _PATHS[path]
    cases = check.of(path)
    if check.is_on(path):
        when = "earlier" if check.remembered else "now"
        return Check("ok", what, f"{len(cases)} cases right, compared {when}")
    fix = f"until `moecli doctor --refresh` finds it right, {otherwise}; a newer driver may help"
    return Check("warn", what, f"off: {why(cases)}", fix)


def _config_file() -> Check:
    path = settings.config_file()
    try:
        count = len(settings.read_config_file(path))
    except MoecliError as error:
        return Check("error", "settings", error.message, error.hint)
    return Check("ok", "settings", f"{count} in {path}" if count else f"none in {path}")


def _existing(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())
