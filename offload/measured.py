"""Knows the bandwidths of this machine: measured once, then kept in a file of the user's cache.

An entry holds for one processor, graphics card, driver and size of memory. A file that cannot be
read or written costs a measurement, never a failure. The disk is not kept: it depends on the path.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload import bandwidth
from offload.hardware import Machine

_FORMAT = 1


@dataclass(frozen=True)
class HostCompute:
    """How to measure what the processor computes; `name` tells kinds of experts and kernels apart.

    `compute` works through some experts and returns their bytes; `share` lets `shared_by` tokens
    share each and returns the operations. None: those are not asked for.
    """

    name: str
    compute: Callable[[], int]
    share: Callable[[], int] | None = None
    shared_by: int = 0


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moecli" / "bandwidths.json"


def with_bandwidths(
    machine: Machine,
    host: HostCompute | None = None,
    refresh: bool = False,
    file: Path | None = None,
    measure: bool = True,
) -> Machine:
    """`machine`, with the bandwidths that it does not state kept or measured.

    Those of a graphics card only where the machine, which must be this one, has one; `host_bw`
    and `host_flops` only where `host` says how. `refresh` forgets what is kept. Takes seconds the
    first time, and no time with `measure` False: what is not kept then stays unknown.
    """
    path = cache_file() if file is None else file
    kept = _read(path)
    entry = kept.setdefault(_key(machine), {})
    if refresh:
        entry.clear()  # what is not measured now will be when it is asked for
    found: dict[str, float] = {}
    changed = False
    for field, name, find in _measurements(machine, host):
        if getattr(machine, field) is not None:
            continue
        value = _positive(entry.get(name))
        if value is None:
            value = find() if measure else None
            if value is None:
                continue
            entry[name], changed = value, True
        found[field] = value
    if changed:
        _write(path, kept)
    return replace(machine, **found)  # type: ignore[arg-type]


def _measurements(
    machine: Machine, host: HostCompute | None
) -> list[tuple[str, str, Callable[[], float | None]]]:
    """(field of Machine, name in the file, how to measure it)."""
    threads = machine.physical_cores or 1
    found: list[tuple[str, str, Callable[[], float | None]]] = [
        ("ram_bw", "ram_bw", lambda: bandwidth.measure_ram(threads))
    ]
    if machine.gpu_name is not None:
        found += [
            ("link_bw", "link_bw", bandwidth.measure_link),
            ("zero_copy_bw", "zero_copy_bw", bandwidth.measure_zero_copy),
            ("vram_bw", "vram_bw", bandwidth.measure_vram),
        ]
    if host is not None:
        compute = host.compute
        found.append(
            ("host_bw", f"host_bw {host.name}", lambda: bandwidth.measure_compute(compute))
        )
    if host is not None and host.share is not None:
        share, name = host.share, f"host_flops {host.name} shared by {host.shared_by}"
        found.append(("host_flops", name, lambda: bandwidth.measure_compute(share)))
    return found


def _key(machine: Machine) -> str:
    """What bandwidths depend on; memory in whole GiB, as a kernel keeps a little for itself."""
    ram = "?" if machine.ram_total is None else f"{round(machine.ram_total / 2**30)} GiB"
    parts = (
        *(machine.cpu_name, f"{machine.physical_cores} cores", ram),
        *(machine.gpu_name, machine.gpu_driver),
    )
    return " | ".join("-" if part is None else part for part in parts)


def _positive(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 < value < float("inf") else None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Entries by machine; none where the file is missing, broken, or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return {}
    machines = content.get("machines")
    if not isinstance(machines, dict):
        return {}
    return {key: entry for key, entry in machines.items() if isinstance(entry, dict)}


def _write(path: Path, machines: dict[str, dict[str, Any]]) -> None:
    """Whole or not at all; another process may write the same at the same time."""
    text = json.dumps({"format": _FORMAT, "machines": machines}, indent=2, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            whole = Path(folder) / path.name
            whole.write_text(text, encoding="utf-8")
            os.replace(whole, path)
    except OSError:
        return  # then the next run measures again
