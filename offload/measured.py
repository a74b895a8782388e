"""Knows the bandwidths of this machine: measured once, then kept in a file of the user's cache.

An entry holds for one processor, graphics card, driver and size of memory, and in it the disks that
were asked about. What was measured while others kept the processors busy is measured again when it
is next asked for, a few times, and the most that was ever found is kept. A file that cannot be read
or written costs a measurement, never a failure.
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
from offload.host import pinnable_nbytes
from offload.load import beside_others
from offload.pinning import CudaPinner

_FORMAT = 1
_DISTURBED = "disturbed"  # of an entry: by name, how often it was measured beside others
_PINNED = "pinned_limit"
_MOST_TRIES = 4
_QUIET_SHARE = 0.1  # of the cores may be busy with others


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
    disk: Path | None = None,
    pinning: bool = False,
) -> Machine:
    """`machine`, with the bandwidths that it does not state kept or measured.

    Those of a graphics card only where the machine, which must be this one, has one; `host_bw`
    and `host_flops` only where `host` says how; that of a disk only where `disk` is a file on it,
    or a directory that may be written to; how much memory can be pinned for the card only where
    `pinning` asks for it, as that may take ten seconds. `refresh` forgets what is kept. Takes
    seconds the first time, and no time with `measure` False: what is not kept then stays unknown.
    Raises OffloadError where a disk cannot be read.
    """
    path = cache_file() if file is None else file
    kept = _read(path)
    entry = kept.setdefault(_key(machine), {})
    if refresh:
        entry.clear()  # what is not measured now will be when it is asked for
    found: dict[str, float] = {}
    changed = False
    for field, name, find in _measurements(machine, host, disk, pinning):
        if getattr(machine, field) is not None:
            continue
        value = _positive(entry.get(name))
        again = 0 < _tries(entry).get(name, 0) < _MOST_TRIES
        if measure and (value is None or again):
            value = _measured(machine, entry, name, find) or value
            changed = changed or value is not None
        if value is not None:
            found[field] = value
    if changed:
        _write(path, kept)
    return replace(machine, **found)  # type: ignore[arg-type]


def disturbed(machine: Machine, file: Path | None = None) -> frozenset[str]:
    """Which of the machine's fields were measured while others kept its processors busy."""
    entry = _read(cache_file() if file is None else file).get(_key(machine), {})
    return frozenset(name.partition(" ")[0] for name in _tries(entry))


def _measured(
    machine: Machine, entry: dict[str, Any], name: str, find: Callable[[], float | None]
) -> float | None:
    """What is found or, where that is more, was found before; the entry keeps it."""
    value, others = beside_others(find)
    if value is None:
        return None
    tries = _tries(entry)
    count = tries.pop(name, 0)
    busy = others > _QUIET_SHARE * (machine.physical_cores or 1)
    if busy and name != _PINNED:  # which is no speed
        tries[name] = count + 1
    entry[_DISTURBED] = tries
    entry[name] = max(value, _positive(entry.get(name)) or 0.0)
    return float(entry[name])


def _tries(entry: dict[str, Any]) -> dict[str, int]:
    tries = entry.get(_DISTURBED)
    if not isinstance(tries, dict):
        return {}
    return {name: count for name, count in tries.items() if type(count) is int and count > 0}


def _measurements(
    machine: Machine, host: HostCompute | None, disk: Path | None, pinning: bool
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
    if machine.gpu_name is not None and pinning:
        found.append((_PINNED, _PINNED, lambda: _pinned_limit(machine)))
    if host is not None:
        compute = host.compute
        found.append(
            ("host_bw", f"host_bw {host.name}", lambda: bandwidth.measure_compute(compute))
        )
    if host is not None and host.share is not None:
        share, name = host.share, f"host_flops {host.name} shared by {host.shared_by}"
        found.append(("host_flops", name, lambda: bandwidth.measure_compute(share)))
    if disk is not None:
        found.append(("disk_bw", f"disk_bw {_disk_of(disk)}", lambda: _disk_bandwidth(disk)))
    return found


def _pinned_limit(machine: Machine) -> int | None:
    """Half of what is available is enough to know, and leaves the rest to others."""
    if machine.ram_available is None:
        return None
    return pinnable_nbytes(CudaPinner("cuda"), machine.ram_available // 2)


def _disk_bandwidth(path: Path) -> float | None:
    """None where the system does not read past its page cache: that would be memory's bandwidth."""
    found = bandwidth.measure_disk(path)
    return found.bytes_per_s if found.direct else None


def _disk_of(path: Path) -> str:
    """What is mounted there, as the system calls it: `/dev/nvme0n1p2`; else the device's number."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return device
    for line in mounts.splitlines():
        where, _, what = line.partition(" - ")
        if device in where.split()[2:3]:
            return what.split()[1]
    return device


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
