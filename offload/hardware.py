"""Knows what this machine has: memory, processor, disk, graphics card; decides nothing.

Whatever cannot be found out is None, on any system. `detect` costs milliseconds; the bandwidths
are measured by `offload.bandwidth` when asked for.
"""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from offload import nvml

_ISA_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_LIBRARIES_NBYTES = 192 << 20  # what libraries and kernels take that are loaded after the context
_CONTEXT_RANGE = range(32 << 20, 2 << 30)  # beyond it, the difference is somebody else's doing
_CGROUP_UNLIMITED = 1 << 60  # version 1 says "no limit" with a huge number


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, bandwidths in bytes a second. A machine nobody owns is made by hand."""

    ram_total: int | None = None  # no more than this process may use
    ram_available: int | None = None  # for this process: cgroup limits and others' use deducted
    cpu_name: str | None = None
    physical_cores: int | None = None  # that this process may use
    isa: tuple[str, ...] = ()  # instruction sets that matter to kernels, as Linux names them
    disk_free: int | None = None  # on the file system of the path asked about
    ram_bw: float | None = None  # reading, all physical cores
    disk_bw: float | None = None  # reading, past the page cache
    pinned_limit: float | None = None  # bytes of main memory, tried up to half of what is free
    link_bw: float | None = None  # copies from pinned main memory to the device
    zero_copy_bw: float | None = None  # kernels of the device that read pinned main memory
    host_bw: float | None = None  # packed bytes of experts that the processor computes
    host_flops: float | None = None  # operations a second on experts that many tokens share
    vram_bw: float | None = None
    gpu_name: str | None = None
    gpu_driver: str | None = None
    vram_total: int | None = None
    vram_free: int | None = (
        None  # what others leave; our own CUDA context, if measured, is free too
    )
    context_nbytes: int | None = (
        None  # of VRAM, CUDA and its libraries in this process, if measured
    )


def detect(path: Path | None = None, gpu: bool = False, root: Path = Path("/")) -> Machine:
    """What this machine has. `path`: whose file system to ask for space (need not exist yet).

    `gpu` asks torch about a CUDA device, which imports torch. `root` is where /proc and /sys are
    looked for.
    """
    total, available = _ram(root)
    name, isa = _cpu(root)
    card = _gpu() if gpu else _Gpu()
    return Machine(
        ram_total=total,
        ram_available=available,
        cpu_name=name or platform.machine() or None,
        physical_cores=_physical_cores(root),
        isa=isa,
        disk_free=_disk_free(path) if path is not None else None,
        gpu_name=card.name,
        gpu_driver=card.driver,
        vram_total=card.total,
        vram_free=card.free,
        context_nbytes=card.context_nbytes,
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def _fields(text: str | None, separator: str | None) -> dict[str, str]:
    """`name<separator>value` lines; of a repeated name the first counts."""
    found: dict[str, str] = {}
    for line in (text or "").splitlines():
        parts = line.split(separator, 1)
        if len(parts) == 2:
            found.setdefault(parts[0].strip(), parts[1].strip())
    return found


# Memory


def _ram(root: Path) -> tuple[int | None, int | None]:
    """(total, available) for this process."""
    meminfo = _fields(_read(root / "proc/meminfo"), ":")
    total, available = _kib(meminfo.get("MemTotal")), _kib(meminfo.get("MemAvailable"))
    if total is None:
        total = _sysconf_ram()
    if available is None:
        available = _available_elsewhere(total)
    for limit, used in _cgroup_memory(root):
        total = limit if total is None else min(total, limit)
        left = max(0, limit - used)
        available = left if available is None else min(available, left)
    return total, available


def _kib(value: str | None) -> int | None:
    number = (value or "").removesuffix("kB").strip()
    return int(number) * 1024 if number.isdigit() else None


def _sysconf_ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows has no sysconf, and some systems lack these names


def peak_rss_nbytes() -> int:
    """Largest resident size of this process so far, in bytes.

    Without /proc what the process took that started this one counts too: it is where the
    system's own count begins.
    """
    peak = _kib(_fields(_read(Path("/proc/self/status")), ":").get("VmHWM"))
    if peak is not None:
        return peak
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _available_elsewhere(total: int | None) -> int | None:
    """Where the system has no /proc: macOS, Windows. accelerate knows how to ask them."""
    from accelerate.utils import get_max_memory  # a second or two, once: it imports torch

    found = get_max_memory()
    available = found.get("cpu", found.get("mps"))  # Apple's cards share main memory
    return total if available is None else int(available)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Where the limits of this process may be written, from its own group up to the top.

    `controller` names a version 1 hierarchy; version 2 has one for all. In a container the path
    that /proc tells is often the host's and not to be seen, but the mount's top then is ours.
    """
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        mounts = [names, controller] if names else ["", "unified"]
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            group = top / path.strip().lstrip("/")
            while group != top and top in group.parents:
                folders.append(group)
                group = group.parent
            folders.append(top)
    return list(dict.fromkeys(folders))


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of every memory limit over this process.

    Pages of files that the system can drop at once are not counted as used.
    """
    found = []
    names = ("memory.max", "memory.current", "inactive_file")
    names_v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name, droppable_name in (names, names_v1):
            limit = _number(folder / limit_name)  # "max" is no number: no limit
            if limit is None or limit >= _CGROUP_UNLIMITED:
                continue
            droppable = _fields(_read(folder / "memory.stat"), None).get(droppable_name, "0")
            used = (_number(folder / used_name) or 0) - int(droppable)
            found.append((limit, max(0, used)))
    return found


# Processor


def _cpu(root: Path) -> tuple[str | None, tuple[str, ...]]:
    info = _fields(_read(root / "proc/cpuinfo"), ":")
    flags = set(info.get("flags", info.get("Features", "")).split())
    return info.get("model name"), tuple(flag for flag in _ISA_FLAGS if flag in flags)


def _physical_cores(root: Path) -> int | None:
    """Cores, not their hyper-threads, that this process may run on, as far as is known."""
    allowed = _allowed_cpus(root)
    cores = set()
    for cpu in allowed:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.strip() if siblings else f"cpu {cpu}")
    count = len(cores) or os.cpu_count()
    quota = _cpu_quota(root)
    return min(count, quota) if count and quota else count


def _allowed_cpus(root: Path) -> list[int]:
    status = _fields(_read(root / "proc/self/status"), ":")
    cpus: list[int] = []
    for part in status.get("Cpus_allowed_list", "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _cpu_quota(root: Path) -> int | None:
    """Whole CPUs' worth of time that the cgroups grant, at least one."""
    found = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").strip().partition(" ")
        if not quota:
            quota = (_read(folder / "cpu.cfs_quota_us") or "").strip()
            period = (_read(folder / "cpu.cfs_period_us") or "").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(max(1, int(quota) // int(period)))
    return min(found, default=None)


# Disk and graphics card


def _disk_free(path: Path) -> int | None:
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


@dataclass(frozen=True)
class _Gpu:
    name: str | None = None
    driver: str | None = None
    total: int | None = None
    free: int | None = None
    context_nbytes: int | None = None


def _gpu() -> _Gpu:
    """The current CUDA device; nothing known without one.

    Its context is created here, if it is not there yet: what that costs is measured where the
    driver tells what was free before.
    """
    import torch

    if not torch.cuda.is_available():
        return _Gpu()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    library = nvml.open_library()
    driver = before = None
    if library is not None:
        driver = nvml.driver_version(library)
        before = nvml.free_nbytes(library, str(getattr(properties, "uuid", "")))
    free, total = torch.cuda.mem_get_info()
    context = _context_nbytes(before, free)
    if context is None:
        return _Gpu(properties.name, driver, total, free)
    return _Gpu(properties.name, driver, total, free + context, context + _LIBRARIES_NBYTES)


_contexts: list[int] = []  # what the context of this process took, once that was seen


def _context_nbytes(before: int | None, after: int) -> int | None:
    """What creating the context took; None where it was there before anybody looked."""
    if not _contexts and before is not None and before - after in _CONTEXT_RANGE:
        _contexts.append(before - after)
    return _contexts[0] if _contexts else None
