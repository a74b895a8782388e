"""Knows in which ways experts can lie in VRAM and RAM, and how fast each way would decode.

Standard library only. Legend: a place is a slot of VRAM or RAM; `room` is what is left of the VRAM
budget for experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from offload.footprint import ModelFootprint
from offload.hardware import Machine
from offload.lanes import HOST, LINK, LaneSpeeds, Misses, expected_misses, link_rows

Lanes = tuple[str, ...]
BOTH: Lanes = (LINK, HOST)
# From simple to intricate, but slots that follow use come before those that are filled once: even
# where the processor serves every miss, they are filled in the time that the link has beside it.
WAYS: tuple[tuple[str, Lanes], ...] = (
    *(("lru", (LINK,)), ("lru", BOTH)),
    *(("pinned", (HOST,)), ("pinned", (LINK,)), ("pinned", BOTH)),
    *(("slice", (LINK,)), ("slice", (HOST,)), ("slice", BOTH)),
)
_WISHES: dict[str, Lanes | None] = {"auto": None, "link": (LINK,), "cpu": (HOST,), "both": BOTH}
LEAST_STAGING = 2  # one expert is computed while the next one comes
_STAGING_PART = 8  # staging takes at most this part of the room, and two layers
_WIDE_ENOUGH = 7 / 8  # of what fits: a smaller slice is not worth its better vectors


@dataclass(frozen=True)
class Places:
    """One way for experts to lie; counts of experts, sizes in bytes."""

    placement: str
    host_slots: int
    device_slots: int = 0
    slice_size: int = 0  # rows of every expert in VRAM
    slice_nbytes: int = 0  # what they take there, of one expert
    staging_slots: int = 0
    device_share: float = 0.0  # of all experts' bytes, in VRAM
    in_memory: int = 0  # experts that some memory holds whole


@dataclass(frozen=True)
class Speed:
    """What one token moves, in bytes, and how fast that goes."""

    vram_nbytes: int
    ram_nbytes: int
    link_nbytes: int
    disk_nbytes: int
    link_share: float = 0.0  # of what VRAM lacks
    link_size: int = 0  # of a slice's remaining rows, how many the link serves
    tok_s: float | None = None  # None where a bandwidth it takes is unknown
    bottleneck: str | None = None


# Places


def places(footprint: ModelFootprint, placement: str, room: int, ram_slots: int) -> Places | None:
    """This placement with as much in VRAM as `room` holds; None where it does not fit.

    `ram_slots` says how many experts main memory could hold.
    """
    total, least = footprint.total_experts, footprint.experts_per_token
    slots = room // footprint.slot_nbytes
    if slots >= total:  # main memory is only passed through, and nothing ever moves
        kind = "lru" if placement == "lru" else "pinned"
        return Places(kind, least, total, device_share=1.0, in_memory=total)
    if room < least_room(footprint, placement):
        return None
    staging = _staging_slots(footprint, placement, room)
    if placement == "slice":
        return _sliced(footprint, room - staging * footprint.slot_nbytes, staging, ram_slots)
    slots -= staging
    # Slots that change need a copy below them; what is pinned in VRAM needs none in RAM.
    host = min(ram_slots, total if placement == "lru" else max(least, total - slots))
    held = max(host, slots) if placement == "lru" else min(total, host + slots)
    return Places(placement, host, slots, 0, 0, staging, slots / total, held)


def least_room(footprint: ModelFootprint, placement: str) -> int:
    """The smallest room that this placement fits; it fits any larger one."""
    everything = footprint.total_experts * footprint.slot_nbytes
    staging = LEAST_STAGING * footprint.slot_nbytes
    return min(everything, _least_resident(footprint, placement) + staging)


def _least_resident(footprint: ModelFootprint, placement: str) -> int:
    """Bytes of VRAM for the fewest residents; those of all experts where nothing less will do."""
    if placement == "lru":
        return footprint.experts_per_token * footprint.slot_nbytes
    if placement == "pinned":
        return 0
    if footprint.intermediate_size <= footprint.group_size:  # it cannot be cut
        return footprint.total_experts * footprint.slot_nbytes
    return footprint.total_experts * footprint.slice_nbytes(footprint.group_size)


def _staging_slots(footprint: ModelFootprint, placement: str, room: int) -> int:
    """Whole experts of a prompt that may be in VRAM on their way through."""
    slot = footprint.slot_nbytes
    good = min(2 * footprint.num_experts, room // slot // _STAGING_PART)
    affordable = (room - _least_resident(footprint, placement)) // slot
    return max(LEAST_STAGING, min(good, affordable))


def _sliced(footprint: ModelFootprint, room: int, staging: int, ram_slots: int) -> Places:
    total = footprint.total_experts
    units = footprint.slice_units
    sizes = [_largest_slice(footprint, unit, room // total) for unit in units]
    size = next(size for size in sizes if size >= _WIDE_ENOUGH * sizes[-1])
    nbytes, share = footprint.slice_nbytes(size), size / footprint.intermediate_size
    host = min(ram_slots, total)
    return Places("slice", host, 0, size, nbytes, staging, share, host)


def _largest_slice(footprint: ModelFootprint, unit: int, nbytes: int) -> int:
    """Most rows, a multiple of `unit` and fewer than all, whose slice takes at most `nbytes`."""
    low, high = 0, footprint.intermediate_size // unit - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = footprint.slice_nbytes(middle * unit) <= nbytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * unit


def ways(placement: str, lane: str) -> Iterator[tuple[str, Lanes]]:
    """Placements and lanes that the wishes allow, the simplest first."""
    wished = _WISHES[lane]
    for name, lanes in WAYS:
        if placement in ("auto", name) and (wished is None or wished == lanes):
            yield name, lanes


# Speed


def speed(footprint: ModelFootprint, machine: Machine, where: Places, lanes: Lanes) -> Speed:
    """One token on a device, by bandwidth alone.

    A token reads from VRAM all dense weights and what lies there of its experts. The rest comes
    over the lanes, which work at the same time; what no memory holds comes from disk before, and
    nothing else overlaps. An expert is resident with the probability that its share says. What
    the link brings into a slot is read there once more; what it reads in place is not.
    """
    active = footprint.active_expert_nbytes
    speeds = lane_speeds(machine, lanes)
    size, rows = where.slice_size, footprint.intermediate_size
    if size:
        by_link = _rows_by_link(footprint, size, speeds)
        link, host = active * by_link / rows, active * (rows - size - by_link) / rows
        misses_s = speeds.seconds(link, host)
    else:
        by_link = 0
        misses = _misses(footprint, where, speeds)
        a_layer = footprint.num_moe_layers * footprint.expert_nbytes
        link, host = a_layer * misses.link, a_layer * misses.host
        misses_s = a_layer * misses.seconds_per_byte
    from_slots = active - host if where.placement == "lru" else active * where.device_share
    vram = footprint.dense_nbytes + from_slots
    total = footprint.total_experts
    disk = active * (total - where.in_memory) / total
    found = Speed(
        vram_nbytes=round(vram),
        ram_nbytes=round(host),
        link_nbytes=round(link),
        disk_nbytes=round(disk),
        link_share=link / (link + host) if link + host else 0.0,
        link_size=by_link,
    )
    if (link and not _link_bw(machine)) or (host and not machine.host_bw):
        return found
    if not machine.vram_bw or (disk and not machine.disk_bw):
        return found
    name = _limit(speeds, link, host)
    parts = {"vram": vram / machine.vram_bw, name: misses_s}
    parts["disk"] = disk / machine.disk_bw if machine.disk_bw else 0.0
    return _timed(found, parts)


def speed_without_device(footprint: ModelFootprint, machine: Machine, in_memory: int) -> Speed:
    """One token where the processor computes all: dense weights and experts are read from RAM.

    Experts as fast as its kernels compute them, where that is known, but not faster than RAM is
    read; dense weights, whose kernels nobody has measured, as fast as RAM is read.
    """
    total, active = footprint.total_experts, footprint.active_expert_nbytes
    disk = round(active * (total - in_memory) / total)
    found = Speed(0, footprint.dense_nbytes + active, 0, disk)
    host, ram = machine.host_bw or inf, machine.ram_bw or inf
    if min(host, ram) == inf or (disk and not machine.disk_bw):
        return found
    parts = {"ram": 0.0, "cpu": 0.0}
    parts["cpu" if host < ram else "ram"] += active / min(host, ram)
    parts["cpu" if ram == inf else "ram"] += footprint.dense_nbytes / (host if ram == inf else ram)
    parts["disk"] = disk / machine.disk_bw if machine.disk_bw else 0.0
    return _timed(found, parts)


def prefill_speed(
    footprint: ModelFootprint, machine: Machine, where: Places
) -> tuple[float, str] | None:
    """Tokens of a long prompt a second on a device, and the bandwidth that limits them.

    By bandwidth alone; None where one is unknown.

    Every chunk streams the experts that some token of it chose (each token choosing at random)
    and that VRAM does not hold, of sliced ones the rows that it lacks, while the ones before are
    computed. Little more than these is copied: see `offload.pieces`.
    """
    tokens, total = footprint.prefill_tokens, footprint.total_experts
    link, disk, vram = machine.link_bw, machine.disk_bw, machine.vram_bw
    chosen = _chosen_nbytes(footprint)
    streamed = chosen * (1 - where.device_share)
    read = chosen * (1 - where.in_memory / total)
    if not tokens or not vram or (streamed and not link) or (read and not disk):
        return None
    parts = {"vram": (footprint.dense_nbytes + chosen) / vram}
    parts["link"] = streamed / link if link and streamed else 0.0
    parts["disk"] = read / disk if disk and read else 0.0
    slowest = max(parts, key=lambda name: parts[name])
    return tokens / parts[slowest], slowest


def prefill_speed_without_device(
    footprint: ModelFootprint, machine: Machine, in_memory: int
) -> tuple[float, str] | None:
    """The same where the processor computes: by its arithmetic, attention left out.

    Meanwhile the experts that a chunk chose are read, from disk where memory lacks them.
    """
    tokens, flops = footprint.prefill_tokens, machine.host_flops
    chosen = _chosen_nbytes(footprint)
    read = chosen * (1 - in_memory / footprint.total_experts)
    if not (tokens and flops and footprint.active_weights) or (read and not machine.disk_bw):
        return None
    parts = {"cpu": 2 * tokens * footprint.active_weights / flops}
    parts["ram"] = (footprint.dense_nbytes + chosen) / (machine.ram_bw or inf)
    parts["disk"] = read / machine.disk_bw if machine.disk_bw else 0.0
    slowest = max(parts, key=lambda name: parts[name])
    return tokens / parts[slowest], slowest


def _chosen_nbytes(footprint: ModelFootprint) -> float:
    """Of the experts that some token of a chunk chooses, each choosing at random."""
    idle = (1 - footprint.experts_per_token / footprint.num_experts) ** footprint.prefill_tokens
    return footprint.experts_nbytes * (1 - idle)


def _misses(footprint: ModelFootprint, where: Places, speeds: LaneSpeeds) -> Misses:
    miss_rate = 1 - where.device_slots / footprint.total_experts
    return expected_misses(footprint.experts_per_token, miss_rate, speeds)


def _rows_by_link(footprint: ModelFootprint, size: int, speeds: LaneSpeeds) -> int:
    """How many of the rows beyond a slice: in the widest unit that divides them well enough."""
    rows = footprint.intermediate_size - size

    def seconds(by_link: int) -> float:
        return speeds.seconds(by_link, rows - by_link)

    units = [unit for unit in footprint.slice_units if rows % unit == 0]
    cuts = [link_rows(rows, unit, speeds) for unit in units]
    return next(cut for cut in cuts if seconds(cut) * _WIDE_ENOUGH <= seconds(cuts[-1]))


def _link_bw(machine: Machine) -> float | None:
    """What kernels read over the link, where that was measured; else what copies reach."""
    return machine.zero_copy_bw or machine.link_bw


def lane_speeds(machine: Machine, lanes: Lanes) -> LaneSpeeds:
    """Of the lanes used; where they are unknown, as if they were equal."""
    ram = machine.ram_bw or inf
    link, host = _link_bw(machine), machine.host_bw
    if (LINK in lanes and not link) or (HOST in lanes and not host):
        link = host = 1.0
    used = LaneSpeeds(link or 0.0 if LINK in lanes else 0.0, host or 0.0 if HOST in lanes else 0.0)
    return replace(used, ram=ram)


def _limit(speeds: LaneSpeeds, link: float, host: float) -> str:
    """Which bandwidth the lanes wait for."""
    if replace(speeds, ram=inf).seconds(link, host) < speeds.seconds(link, host):
        return "ram"
    return "link and cpu" if link and host else "cpu" if host else "link"


def _timed(found: Speed, parts: dict[str, float]) -> Speed:
    slowest = max(parts, key=lambda name: parts[name])
    return replace(found, tok_s=1 / sum(parts.values()), bottleneck=slowest)
