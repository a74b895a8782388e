"""Knows what `moecli doctor` looks at: the machine, the packages, the places. Changes nothing."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from moecli import __version__, options, settings, store, ui
from moecli.errors import MoecliError
from moecli.units import GIB, format_nbytes
from offload.errors import OffloadError

if TYPE_CHECKING:
    from offload.hardware import Machine

HELP = """Check what moecli stands on: packages, processor, memory, disk, graphics card, places.

One line a check; memory and disk are measured, which takes a second or two. Exits with 1 where
something is wrong."""
EXAMPLES = """
moecli doctor
moecli doctor --json > report.json
"""
_LITTLE_RAM = 4 * GIB
_LITTLE_DISK = 20 * GIB
_PACKAGES = ("torch", "transformers", "tokenizers", "typer", "rich")
_FAST_ISA = {"avx2", "asimd"}


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it."""

    status: Literal["ok", "warn", "error"]
    what: str
    found: str
    fix: str | None = None


def doctor(as_json: options.Json = False) -> None:
    checks = list(all_checks())
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        ui.show_checks([(c.status, c.what, c.found, c.fix) for c in checks])
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


def all_checks() -> Iterator[Check]:
    """In the order of the report; each is found when it is asked for."""
    from offload.hardware import detect

    yield Check("ok", "moecli", __version__)
    yield Check("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        yield _package(package)
    place = _existing(store.models_dir())
    machine = detect(place, gpu=True)
    yield _processor(machine)
    yield _ram(machine)
    yield _disk(place, machine)
    yield from _bandwidths(place, machine)
    yield _graphics(machine)
    yield Check("ok", "models", f"{len(store.models())} in {store.models_dir()}")
    yield _config_file()


def _package(name: str) -> Check:
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


def _bandwidths(place: Path, machine: "Machine") -> Iterator[Check]:
    from offload.bandwidth import measure_disk, measure_ram

    ram = measure_ram(machine.physical_cores or 1)
    yield Check("warn" if ram is None else "ok", "RAM speed", ui.bandwidth(ram))
    try:
        disk = measure_disk(place)
    except OffloadError as error:
        yield Check("warn", "disk speed", error.message, error.hint)
        return
    cached = "" if disk.direct else ", some of it perhaps from memory"
    yield Check("ok", "disk speed", ui.bandwidth(disk.bytes_per_s) + cached)


def _graphics(machine: "Machine") -> Check:
    if machine.gpu_name is None:
        return Check("ok", "graphics", "no CUDA device; everything runs on the processor")
    total = "" if machine.vram_total is None else f", {format_nbytes(machine.vram_total)}"
    found = f"{machine.gpu_name}{total}"
    return Check("warn", "graphics", found, "this version does not use it yet")


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
