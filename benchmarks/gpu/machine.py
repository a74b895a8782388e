"""Knows what the machine of this run is, and how fast its memories are, each measured now."""

import platform
import statistics
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu import read_kernel
from benchmarks.gpu.report import Section
from benchmarks.gpu.roofline import Bandwidths
from benchmarks.gpu.sizes import REAL, TINY, Sizes
from benchmarks.gpu.timing import seconds_each, wall_seconds

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "pytest")
_LINK_COPIES = 4
_HOST_SECONDS = 2.0


def device_of(tiny: bool) -> torch.device:
    return torch.device("cpu" if tiny else "cuda")


def sizes_of(tiny: bool) -> Sizes:
    return TINY if tiny else REAL


def measure(section: Section, tiny: bool) -> None:
    device, sizes = device_of(tiny), sizes_of(tiny)
    section.part("versions", versions)
    section.part("gpu", lambda: gpu(device))
    section.part("host", host)
    section.part("vram_copy", lambda: vram_copy(device, sizes))
    section.part("link_copy", lambda: link_copy(device, sizes))
    section.part("link_kernel", lambda: kernel_read(device, sizes, pinned=True))
    section.part("vram_kernel", lambda: kernel_read(device, sizes, pinned=False))
    section.part("ram_read", lambda: ram_read(sizes))
    section.part("host_experts", lambda: host_experts(sizes), needs_s=_HOST_SECONDS)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu(device: torch.device) -> dict[str, Any]:
    from moecli.selfcheck import driver_version

    if device.type != "cuda":
        return {"name": "none: a trial on the processor", "vram_nbytes": None}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_nbytes": getattr(properties, "L2_cache_size", None),
        "vram_nbytes": total,
        "vram_free_nbytes": free,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def host() -> dict[str, Any]:
    from offload.hardware import detect

    machine = detect()
    return {
        "cpu": machine.cpu_name,
        "physical_cores": machine.physical_cores,
        "isa": list(machine.isa),
        "ram_nbytes": machine.ram_total,
        "ram_available_nbytes": machine.ram_available,
        "threads": torch.get_num_threads(),
    }


def vram_copy(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Traffic of a copy within VRAM: each byte is read and written."""
    source = torch.ones(sizes.copy_nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_each([lambda: target.copy_(source)] * 2, device, sizes.repeats)
    return {"bytes_per_s": 2 * sizes.copy_nbytes / seconds, "nbytes": sizes.copy_nbytes}


def host_block(device: torch.device, nbytes: int) -> torch.Tensor:
    """Main memory that a CUDA device may read; uint8 [nbytes], written once."""
    block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return block.fill_(1)


def link_copy(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """The copy engine, from pinned memory to the device; and both ways for the way back."""
    source = host_block(device, sizes.copy_nbytes)
    target = torch.empty(sizes.copy_nbytes, dtype=torch.uint8, device=device)

    def copies() -> None:
        for _ in range(_LINK_COPIES):
            target.copy_(source, non_blocking=True)

    def back() -> None:
        source.copy_(target, non_blocking=True)

    seconds = statistics.median(wall_seconds(copies, device, sizes.repeats)) / _LINK_COPIES
    back_seconds = statistics.median(wall_seconds(back, device, sizes.repeats))
    return {
        "bytes_per_s": sizes.copy_nbytes / seconds,
        "to_host_bytes_per_s": sizes.copy_nbytes / back_seconds,
        "nbytes": sizes.copy_nbytes,
    }


def kernel_read(device: torch.device, sizes: Sizes, pinned: bool) -> dict[str, Any]:
    """A kernel that reads a block once: pinned main memory (zero copy), or VRAM.

    With several numbers of programs: how many it takes to fill the link is a fact of its own.
    """
    nbytes = sizes.copy_nbytes
    place = torch.device("cpu") if pinned else device
    block = host_block(device, nbytes)
    if not pinned:
        block = block.to(device)
    address = torch.tensor([block.data_ptr()], dtype=torch.int64, device=device)
    rates: dict[str, float] = {}
    for programs in sorted({max(1, sizes.read_programs >> shift) for shift in (0, 2, 4, 6)}):
        sums = torch.zeros(programs, dtype=torch.int64, device=device)
        read_kernel.read(address, nbytes, sums)
        expected = nbytes // 4 * 0x01010101
        assert int(sums.sum()) == expected, "the kernel did not read what is there"
        launches = [lambda sums=sums: read_kernel.read(address, nbytes, sums)] * 2
        rates[str(programs)] = nbytes / seconds_each(launches, device, sizes.repeats)
    return {
        "bytes_per_s": max(rates.values()),
        "by_programs": rates,
        "nbytes": nbytes,
        "place": place.type,
    }


def ram_read(sizes: Sizes) -> dict[str, float | int | None]:
    from offload.bandwidth import measure_ram
    from offload.hardware import detect

    threads = detect().physical_cores or 1
    nbytes = min(256 << 20, sizes.copy_nbytes) * (1 if threads < 8 else 4)
    return {"bytes_per_s": measure_ram(threads, nbytes), "threads": threads}


def host_experts(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Bytes of experts a second that the processor's kernels get through, one token at a time."""
    from benchmarks.gpu.random_experts import expert_blobs
    from quant import ops

    found: dict[str, dict[str, float]] = {}
    for shape in sizes.experts:
        for scheme in sizes.schemes:
            layout = shape.layout(scheme)
            count = max(shape.top_k, min(2, shape.num_experts))
            (blob,) = expert_blobs(layout, 1, torch.device("cpu"))
            blobs = [blob, *(blob.clone() for _ in range(count - 1))]
            table = torch.zeros(shape.num_experts, dtype=torch.int64)  # [E]
            table[:count] = torch.tensor([blob.data_ptr() for blob in blobs])
            ids = torch.arange(shape.top_k)[None]  # [1, k]
            weights = torch.full((1, shape.top_k), 0.5)
            hidden = torch.randn(1, shape.hidden_size)
            out = torch.zeros(1, shape.hidden_size)
            seconds = statistics.median(
                wall_seconds(
                    lambda args=(out, hidden, ids, weights, table, layout): ops.add_routed_experts(
                        *args
                    ),
                    torch.device("cpu"),
                    repeats=3,
                )
            )
            nbytes = shape.top_k * layout.nbytes
            name = f"{shape.name} {scheme.name}"
            found[name] = {"bytes_per_s": nbytes / seconds, "seconds": seconds, "nbytes": nbytes}
    return found


def bandwidths(found: dict[str, Any], expert: str) -> Bandwidths | None:
    """The bandwidths of an earlier machine section; `expert`: whose rate the processor has.

    None where one of them is missing.
    """
    parts = found.get("machine", {}).get("parts", {})

    def rate(name: str) -> float | None:
        return parts.get(name, {}).get("result", {}).get("bytes_per_s")

    experts = parts.get("host_experts", {}).get("result", {}).get(expert, {}).get("bytes_per_s")
    rates = [rate(name) for name in ("vram_copy", "link_copy", "link_kernel", "ram_read")]
    if experts is None or any(found is None for found in rates):
        return None
    return Bandwidths(*(float(found) for found in rates), host_experts=experts)
