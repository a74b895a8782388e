"""Knows the arithmetic of bounds: bytes over bandwidths. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second, as measured in this run."""

    vram: float  # traffic of a copy within it: read and written
    link: float  # copy engine, pinned memory to device
    link_kernel: float  # a kernel reading pinned memory
    ram: float  # reading, all cores
    host_experts: float  # bytes of experts that the processor's kernels get through


@dataclass(frozen=True)
class StepBytes:
    """What one decoded token moves, on average."""

    vram: float  # read by kernels from VRAM: dense weights, resident experts, KV cache
    fetched: float  # copied over the link into slots, then read from there
    linked: float  # read over the link by kernels
    host: float  # computed by the processor


@dataclass(frozen=True)
class Bound:
    """Tokens a second that bandwidth allows: all lanes at once, and one after the other."""

    overlapped_tok_s: float
    serial_tok_s: float
    bottleneck: str
    seconds: Mapping[str, float]  # of each lane


def bound(step: StepBytes, rates: Bandwidths) -> Bound:
    """Link lanes share the link; what the processor computes shares RAM with them, and is bounded
    by its own rate. A fetched byte is read from VRAM too.
    """
    seconds = {
        "vram": (step.vram + step.fetched) / rates.vram,
        "link": step.fetched / rates.link + step.linked / rates.link_kernel,
        "host": step.host / rates.host_experts,
        "ram": (step.fetched + step.linked + step.host) / rates.ram,
    }
    slowest = max(seconds, key=lambda lane: seconds[lane])
    serial = seconds["vram"] + seconds["link"] + seconds["host"]
    return Bound(1 / seconds[slowest], 1 / serial, slowest, seconds)


def share(part: float, whole: float | None) -> float | None:
    """part / whole; None where the whole is unknown."""
    return part / whole if whole else None
