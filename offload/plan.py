"""Knows how a model's bytes divide over a machine's memories, and how fast that should run.

Arithmetic on sizes alone: standard library only, reads nothing, allocates nothing. The plan is
the placement: the engine makes its tiers from the very object that the user was shown.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from offload.errors import OffloadError
from offload.footprint import ModelFootprint
from offload.hardware import Machine
from offload.lanes import HOST, LINK, link_counts, link_idle
from offload.placing import (
    Lanes,
    Places,
    Speed,
    lane_speeds,
    least_room,
    places,
    prefill_speed,
    prefill_speed_without_device,
    speed,
    speed_without_device,
    ways,
)

__all__ = ["MemoryPlan", "ModelFootprint", "largest_context", "make_plan", "plan_context"]

MAX_CHOICES = 64  # experts that a layer asks for in one step on a device
RAM_SHARE = 0.8  # of the available memory, when no budget is given
VRAM_MARGIN = 512 << 20  # left to the desktop and other programs, when no budget is given
CONTEXT_ASSUMED = 640 << 20  # CUDA's context, libraries and kernels, where not measured
# The next simpler way is taken unless another is predicted to be faster by more than this: the
# hit rate assumed of `lru` is the least that it reaches, as routers tend to repeat themselves.
CLEAR_GAIN = 1.1


@dataclass(frozen=True)
class MemoryPlan:
    """Who lies where. Sizes in bytes, rates in bytes or tokens a second; made by `make_plan`.

    With a device the dense weights, KV cache and workspace are in VRAM and `host_*` holds what
    the device does not; without one `vram_budget`, `device_*`, `slice_*`, `staging_*` and
    `vram_*` are 0 and there are no lanes.

    Placements: `lru`, slots that change by use; `pinned`, slots that are filled once; `slice`,
    the first rows of every expert. Lanes serve what VRAM lacks: `link`, the device reads main
    memory; `host`, the processor computes in main memory.
    """

    ram_budget: int
    vram_budget: int
    placement: str  # "lru", "pinned" or "slice"
    lanes: Lanes  # "link", "host", or both; none where VRAM lacks nothing
    dense_nbytes: int
    embedding_nbytes: int
    embedding_on_device: bool
    kv_nbytes: int
    workspace_nbytes: int
    context_nbytes: int  # of VRAM: CUDA itself and its libraries
    host_bias_nbytes: int  # of RAM: biases of experts that the processor may compute
    bounce_nbytes: int  # of RAM: what is on its way from pageable memory to the device
    total_experts: int
    expert_nbytes: int
    slot_nbytes: int
    host_slots: int
    device_slots: int  # whole experts in VRAM
    intermediate_size: int  # rows of an expert; 0 where they are unknown
    slice_size: int  # rows [0, slice_size) of every expert in VRAM; 0 unless sliced
    slice_nbytes: int  # what they take there, of one expert
    link_size: int  # rows after the slice that the link serves; the processor takes those after
    staging_slots: int  # VRAM through which a prompt's experts pass, in whole experts
    host_resident_share: float  # of all experts, in main memory
    device_resident_share: float  # of all experts' bytes, in VRAM
    resident_experts: int  # that some memory holds whole
    disk_nbytes: int  # experts with no place in any memory
    hit_rate_assumed: float  # of the top tier; the share resident there, until a trace knows better
    link_share: float  # of what VRAM lacks, what the link serves
    link_counts: tuple[int, ...]  # of so many experts that a layer misses, how many the link serves
    link_idle: tuple[int, ...]  # and how many bytes more it brings into slots meanwhile
    ram_nbytes_per_token: int  # read from main memory by the processor
    vram_nbytes_per_token: int  # read from VRAM by kernels
    link_nbytes_per_token: int  # expected to go to the device
    disk_nbytes_per_token: int  # expected to be read from disk
    predicted_tok_s: float | None  # decode, by bandwidth alone; None where one is unknown
    bottleneck: str | None  # "disk", "ram", "link", "cpu", "link and cpu" or "vram"
    link_tok_s: float | None  # the same if the link alone served what VRAM lacks
    host_tok_s: float | None  # the same if the processor did
    predicted_prefill_tok_s: float | None  # on a device by bandwidth alone; None where unknown
    prefill_bottleneck: str | None  # "link", "disk", "vram", "cpu" or "ram"
    ram_nbytes: int  # of the budget, what the plan uses
    vram_nbytes: int
    ram_available: int | None  # on the machine, when the plan was made
    vram_free_before: int | None  # on the machine, when the plan was made

    @property
    def on_device(self) -> bool:
        return self.vram_budget > 0

    @property
    def host_arena_nbytes(self) -> int:
        return self.host_slots * self.slot_nbytes

    @property
    def device_pool_nbytes(self) -> int:
        """VRAM of resident experts, whole or sliced."""
        return self.device_slots * self.slot_nbytes + self.total_experts * self.slice_nbytes

    @property
    def staging_nbytes(self) -> int:
        return self.staging_slots * self.slot_nbytes

    @property
    def drop_cache(self) -> bool:
        """Whether to read the disk past the system's page cache.

        The cache pays only if the memory that the plan leaves alone holds all experts: with less,
        it answers some misses ten times as fast, but slows the others down by more than that saves.
        """
        if self.ram_available is None:
            return False
        experts_nbytes = self.total_experts * self.slot_nbytes
        return experts_nbytes > self.ram_available - self.ram_nbytes

    @property
    def resident_share(self) -> float:
        """Share of all experts that some memory holds."""
        return self.resident_experts / self.total_experts

    @property
    def all_resident(self) -> bool:
        return self.disk_nbytes == 0

    @property
    def ram_free(self) -> int:
        """Bytes of the budget that the plan leaves."""
        return self.ram_budget - self.ram_nbytes

    @property
    def vram_free(self) -> int:
        return self.vram_budget - self.vram_nbytes

    @property
    def ram_short(self) -> int:
        """Bytes the plan uses beyond what the machine had available; 0 if that is unknown."""
        return 0 if self.ram_available is None else max(0, self.ram_nbytes - self.ram_available)

    @property
    def vram_short(self) -> int:
        """The same of VRAM."""
        free = self.vram_free_before
        return 0 if free is None else max(0, self.vram_nbytes - free)

    def to_dict(self) -> dict[str, Any]:
        """Every field and derived number, for `--json`."""
        derived = (
            *("on_device", "host_arena_nbytes", "device_pool_nbytes", "staging_nbytes"),
            *("drop_cache", "resident_share", "all_resident"),
            *("ram_free", "vram_free", "ram_short", "vram_short"),
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def make_plan(
    footprint: ModelFootprint,
    machine: Machine,
    ram_nbytes: int | None = None,
    vram_nbytes: int | None = None,
    *,
    placement: str = "auto",
    lane: str = "auto",
) -> MemoryPlan:
    """Divide the budgets: what must be there first, then as many experts as fit.

    `ram_nbytes` None takes 80% of the memory that the machine has available; `vram_nbytes` None
    what its graphics card has free, less a margin, where there is one. 0 plans without a device.
    `placement` and `lane` (link, cpu, both) leave "auto" to the predicted speed: of the ways that
    fit, the simplest that comes close to the fastest. Speeds are those of `offload.placing`; the
    KV cache is left out of them, as is all compute.

    Raises OffloadError when a budget is too small, saying what is needed.
    """
    budget = _vram_budget(machine, vram_nbytes)
    if ram_nbytes is None:
        ram_nbytes = _ram_budget(machine)
    if budget is None:
        return _plan_without_device(footprint, machine, ram_nbytes)
    room = budget - _vram_fixed(footprint, machine)
    spare = room - footprint.total_experts * footprint.slot_nbytes
    embedding_on_device = 0 < footprint.embedding_nbytes <= spare
    ram_fixed = footprint.slot_nbytes  # on its way to the device
    ram_fixed += footprint.host_bias_nbytes
    if not embedding_on_device:
        ram_fixed += footprint.embedding_nbytes
    ram_slots = _ram_slots(footprint, ram_nbytes, ram_fixed)
    if (placement, lane) == ("lru", "cpu"):
        raise OffloadError(
            "with `--lane cpu` nothing would ever come into the slots of `--placement lru`",
            "give `--placement pinned`, or `--lane both`",
        )
    found = _options(footprint, machine, placement, lane, room, ram_slots)
    if not found:
        raise _too_little_vram(footprint, machine, budget, placement)
    where, lanes, fast = _choose(found)
    plan = _plan(footprint, machine, where, fast, ram_nbytes, ram_fixed)
    speeds = lane_speeds(machine, lanes)
    idle = link_idle(speeds, MAX_CHOICES, footprint.experts_per_token, machine.vram_bw or inf)
    resident = where.device_slots * footprint.slot_nbytes
    resident += footprint.total_experts * where.slice_nbytes
    fixed = budget - room + where.staging_slots * footprint.slot_nbytes
    prefill, prefill_limit = prefill_speed(footprint, machine, where) or (None, None)
    return replace(
        plan,
        vram_budget=budget,
        lanes=lanes if where.device_share < 1 else (),
        link_counts=link_counts(speeds, MAX_CHOICES),
        link_idle=tuple(int(share * footprint.expert_nbytes) for share in idle),
        embedding_on_device=embedding_on_device,
        workspace_nbytes=footprint.device_workspace,
        context_nbytes=_context(machine),
        host_bias_nbytes=footprint.host_bias_nbytes,
        bounce_nbytes=footprint.slot_nbytes,
        link_tok_s=speed(footprint, machine, where, (LINK,)).tok_s,
        host_tok_s=speed(footprint, machine, where, (HOST,)).tok_s,
        predicted_prefill_tok_s=prefill,
        prefill_bottleneck=prefill_limit,
        vram_nbytes=fixed + resident + (footprint.embedding_nbytes if embedding_on_device else 0),
        vram_free_before=machine.vram_free,
    )


def _ram_budget(machine: Machine) -> int:
    if machine.ram_available is None:
        raise OffloadError("cannot tell how much memory this machine has", "say it with `--ram`")
    return int(machine.ram_available * RAM_SHARE)


def _vram_budget(machine: Machine, asked: int | None) -> int | None:
    """None: no device."""
    if asked is None:
        return None if machine.vram_free is None else max(0, machine.vram_free - VRAM_MARGIN)
    return asked or None


def _context(machine: Machine) -> int:
    return CONTEXT_ASSUMED if machine.context_nbytes is None else machine.context_nbytes


def _vram_fixed(footprint: ModelFootprint, machine: Machine) -> int:
    return footprint.on_device_nbytes + _context(machine)


Option = tuple[Places, Lanes, Speed]


def _options(
    footprint: ModelFootprint,
    machine: Machine,
    placement: str,
    lane: str,
    room: int,
    ram_slots: int,
) -> list[Option]:
    """Every way that is wished for and fits, the simplest first."""
    found: list[Option] = []
    for name, lanes in ways(placement, lane):
        if lane == "auto" and HOST in lanes and not machine.host_bw:
            continue
        where = places(footprint, name, room, ram_slots)
        if where is None:
            continue
        if placement == "auto" and _is_pointless(footprint, where, name, lanes, found):
            continue
        found.append((where, lanes, speed(footprint, machine, where, lanes)))
    return found


def _is_pointless(
    footprint: ModelFootprint, where: Places, name: str, lanes: Lanes, simpler: list[Option]
) -> bool:
    """Whether a placement has nothing over the simpler ones that bandwidth could tell."""
    if where.device_share == 1:
        return name != "pinned"  # nothing ever moves
    if name == "lru" and footprint.experts_per_token == footprint.num_experts:
        return True  # each would leave before it is wanted again
    if name == "pinned" and LINK in lanes:
        # Slots filled once hold other experts than RAM does; that is all they gain.
        return any(o.placement == "lru" and o.in_memory == where.in_memory for o, _, _ in simpler)
    return False


def _choose(options: list[Option]) -> Option:
    """The simplest that comes close to the fastest; just the simplest where a speed is unknown."""
    speeds = [fast.tok_s for _, _, fast in options]
    known = [tok_s for tok_s in speeds if tok_s is not None]
    if len(known) < len(speeds):
        return options[0]
    return next(
        o for o, tok_s in zip(options, known, strict=True) if tok_s * CLEAR_GAIN >= max(known)
    )


def _plan_without_device(footprint: ModelFootprint, machine: Machine, budget: int) -> MemoryPlan:
    fixed = footprint.fixed_nbytes
    slots = min(_ram_slots(footprint, budget, fixed), footprint.total_experts)
    where = Places("lru", slots, in_memory=slots)
    fast = speed_without_device(footprint, machine, slots)
    plan = _plan(footprint, machine, where, fast, budget, fixed)
    prefill, limit = prefill_speed_without_device(footprint, machine, slots) or (None, None)
    return replace(plan, predicted_prefill_tok_s=prefill, prefill_bottleneck=limit)


def _plan(
    footprint: ModelFootprint,
    machine: Machine,
    where: Places,
    fast: Speed,
    ram_budget: int,
    ram_fixed: int,
) -> MemoryPlan:
    """The plan without what only a device has."""
    total = footprint.total_experts
    on_device = where.device_slots or where.slice_size or where.staging_slots
    host_share = where.host_slots / total
    return MemoryPlan(
        ram_budget=ram_budget,
        vram_budget=0,
        placement=where.placement,
        lanes=(),
        dense_nbytes=footprint.dense_nbytes,
        embedding_nbytes=footprint.embedding_nbytes,
        embedding_on_device=False,
        kv_nbytes=footprint.kv_nbytes,
        workspace_nbytes=footprint.workspace_nbytes,
        context_nbytes=0,
        host_bias_nbytes=0,
        bounce_nbytes=0,
        total_experts=total,
        expert_nbytes=footprint.expert_nbytes,
        slot_nbytes=footprint.slot_nbytes,
        host_slots=where.host_slots,
        device_slots=where.device_slots,
        intermediate_size=footprint.intermediate_size,
        slice_size=where.slice_size,
        slice_nbytes=where.slice_nbytes,
        link_size=fast.link_size,
        staging_slots=where.staging_slots,
        host_resident_share=host_share,
        device_resident_share=where.device_share,
        resident_experts=where.in_memory,
        disk_nbytes=(total - where.in_memory) * footprint.expert_nbytes,
        hit_rate_assumed=where.device_share if on_device else host_share,
        link_share=fast.link_share,
        link_counts=(),
        link_idle=(),
        ram_nbytes_per_token=fast.ram_nbytes,
        vram_nbytes_per_token=fast.vram_nbytes,
        link_nbytes_per_token=fast.link_nbytes,
        disk_nbytes_per_token=fast.disk_nbytes,
        predicted_tok_s=fast.tok_s,
        bottleneck=fast.bottleneck,
        link_tok_s=None,
        host_tok_s=None,
        predicted_prefill_tok_s=None,
        prefill_bottleneck=None,
        ram_nbytes=ram_fixed + where.host_slots * footprint.slot_nbytes,
        vram_nbytes=0,
        ram_available=machine.ram_available,
        vram_free_before=None,
    )


# What is too small


def _ram_slots(footprint: ModelFootprint, budget: int, fixed: int) -> int:
    """How many experts fit beside `fixed` bytes; OffloadError unless one token's of a layer do."""
    least = footprint.experts_per_token
    slots = (budget - fixed) // footprint.slot_nbytes
    if slots < least:
        needed = fixed + least * footprint.slot_nbytes
        experts, short = f"{least} expert{'' if least == 1 else 's'}", needed - budget
        raise OffloadError(
            f"{_gib(budget)} of RAM are too little: the model needs {_gib(needed)} "
            f"({_gib(fixed)} that must be there, {_gib(needed - fixed)} for {experts})",
            f"give `--ram {_gib(needed, roundup=True)}` or more{_or_shorter(footprint, short)}",
        )
    return slots


def _too_little_vram(
    footprint: ModelFootprint, machine: Machine, budget: int, placement: str
) -> OffloadError:
    fixed = _vram_fixed(footprint, machine)
    kind = "pinned" if placement == "auto" else placement  # it asks least
    needed = fixed + least_room(footprint, kind)
    parts = (
        (footprint.dense_nbytes, "of dense weights"),
        (footprint.kv_nbytes, "of KV cache"),
        (footprint.device_workspace, "of workspace"),
        (_context(machine), "for CUDA itself"),
        (needed - fixed, "for experts"),
    )
    said = ", ".join(f"{_gib(nbytes)} {what}" for nbytes, what in parts if nbytes)
    with_placement = "" if placement == "auto" else f" with `--placement {placement}`"
    shorter = _or_shorter(footprint, needed - budget)
    hint = f"give `--vram {_gib(needed, roundup=True)}` or more{shorter}"
    if machine.vram_total is not None and needed > machine.vram_total:
        hint = "give a shorter context with `--ctx`; `--device cpu` needs no VRAM"
    least = fixed + least_room(footprint, "pinned")
    if placement != "auto" and least <= budget:
        hint = f"`--placement auto` fits; or give `--vram {_gib(needed, roundup=True)}` or more"
    return OffloadError(
        f"{_gib(budget)} of VRAM are too little: the model needs {_gib(needed, True)}"
        f"{with_placement} ({said})",
        hint,
    )


def _or_shorter(footprint: ModelFootprint, short: int) -> str:
    """A shorter context, where that could save the `short` bytes that a budget lacks."""
    return ", or a shorter context with `--ctx`" if short <= footprint.kv_nbytes else ""


def _gib(nbytes: int, roundup: bool = False) -> str:
    """A size for people, in MiB below one GiB; rounded up where it is a promise to fit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            hundredths = nbytes * 100 / unit
            return f"{(-(-nbytes * 100 // unit) if roundup else round(hundredths)) / 100:g}{name}"
    return f"{nbytes}B"


# Contexts

FootprintAt = Callable[[int], ModelFootprint]


def largest_context(
    footprint_at: FootprintAt,
    machine: Machine,
    max_ctx: int,
    ram_nbytes: int | None = None,
    vram_nbytes: int | None = None,
    *,
    placement: str = "auto",
    lane: str = "auto",
) -> int | None:
    """The longest context, up to `max_ctx` tokens, whose plan fits; None when none does.

    `footprint_at(ctx)` gives the sizes at a context; they must not shrink as it grows.
    """

    def fits(ctx: int) -> bool:
        try:
            make_plan(
                *(footprint_at(ctx), machine, ram_nbytes, vram_nbytes),
                placement=placement,
                lane=lane,
            )
        except OffloadError:
            return False
        return True

    if not fits(1):
        return None
    low, high = 1, max_ctx
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def plan_context(
    footprint_at: FootprintAt,
    machine: Machine,
    ctx: int,
    ram_nbytes: int | None = None,
    vram_nbytes: int | None = None,
    *,
    placement: str = "auto",
    lane: str = "auto",
) -> MemoryPlan:
    """The plan at a context; the error of one that does not fit names the longest that does."""
    budgets = ram_nbytes, vram_nbytes
    try:
        return make_plan(footprint_at(ctx), machine, *budgets, placement=placement, lane=lane)
    except OffloadError as error:
        largest = largest_context(
            footprint_at, machine, ctx, *budgets, placement=placement, lane=lane
        )
        if largest is None:
            raise
        raise OffloadError(
            error.message, f"a context of {largest} tokens fits: `--ctx {largest}`"
        ) from error
