"""Knows which bytes decoding reads from which memory, and how fast their bandwidths allow that.

Reckons with what was counted, not with what a plan expects. The KV cache is left out, as in plans.
"""

from dataclasses import dataclass

from offload.hardware import Machine
from offload.plan import MemoryPlan
from offload.stats import CacheStats


@dataclass(frozen=True)
class Traffic:
    """Bytes a token, by the memory that they are read from."""

    ram: float  # by the processor
    vram: float
    link: float  # main memory, by the device
    disk: float

    @property
    def moved(self) -> float:
        """What had to come from another place than where it is computed."""
        return self.link + self.disk


def decode_traffic(plan: MemoryPlan, counted: CacheStats, steps: int, tokens: int) -> Traffic:
    """What `steps` forward passes, which gave `tokens` tokens, have read according to `counted`.

    Slices are not counted by bytes: of them the plan says what a token reads.
    """
    disk = counted.disk_nbytes / tokens
    if plan.slice_size:
        return Traffic(
            plan.ram_nbytes_per_token, plan.vram_nbytes_per_token, plan.link_nbytes_per_token, disk
        )
    expert, dense = plan.expert_nbytes / tokens, plan.dense_nbytes * steps / tokens
    if not plan.on_device:
        return Traffic(dense + counted.requests * expert, 0.0, 0.0, disk)
    in_slots = counted.hits + counted.fetched  # what is linked is not read from VRAM
    link = counted.device_nbytes / tokens
    return Traffic(counted.hosted * expert, dense + in_slots * expert, link, disk)


def allowed_tok_s(traffic: Traffic, machine: Machine) -> float | None:
    """Tokens a second if every memory were read at its bandwidth, all at the same time.

    None where a bandwidth that this takes is unknown.
    """
    rates = {
        "ram": machine.ram_bw,
        "vram": machine.vram_bw,
        "link": machine.zero_copy_bw or machine.link_bw,
        "disk": machine.disk_bw,
    }
    seconds = []
    for memory, rate in rates.items():
        nbytes = getattr(traffic, memory)
        if nbytes and not rate:
            return None
        if nbytes:
            seconds.append(nbytes / rate)
    return 1 / max(seconds)
