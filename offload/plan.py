"""Knows how a model's bytes divide over a machine's memories, and how fast that should run.

Arithmetic on sizes alone: standard library only, reads nothing, allocates nothing. The plan is
the placement: the engine makes its tiers from the very object that the user was shown.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from offload.errors import OffloadError
from offload.hardware import Machine

RAM_SHARE = 0.8  # of the available memory, when no budget is given


@dataclass(frozen=True)
class ModelFootprint:
    """What a model needs, in bytes, for one context length."""

    dense_nbytes: int  # all weights but routed experts and the input embedding; read every token
    embedding_nbytes: int  # the input embedding: resident, but one row is read a token; 0 if tied
    kv_nbytes: int  # KV cache at this context
    workspace_nbytes: int  # activations and logits
    num_moe_layers: int
    num_experts: int  # a layer
    experts_per_token: int
    expert_nbytes: int
    slot_nbytes: int  # an expert rounded up to what a slot takes

    def __post_init__(self) -> None:
        assert 1 <= self.experts_per_token <= self.num_experts, "more experts a token than a layer"
        assert self.num_moe_layers >= 1, "a model without experts"
        assert 0 < self.expert_nbytes <= self.slot_nbytes, "an expert that does not fit its slot"

    @property
    def total_experts(self) -> int:
        return self.num_moe_layers * self.num_experts

    @property
    def experts_nbytes(self) -> int:
        """All routed experts, as they lie on disk."""
        return self.total_experts * self.expert_nbytes

    @property
    def active_expert_nbytes(self) -> int:
        """Bytes of routed experts that one token needs."""
        return self.num_moe_layers * self.experts_per_token * self.expert_nbytes

    @property
    def fixed_nbytes(self) -> int:
        """What must be in memory besides experts."""
        return self.dense_nbytes + self.embedding_nbytes + self.kv_nbytes + self.workspace_nbytes


@dataclass(frozen=True)
class MemoryPlan:
    """Who lies where. Sizes in bytes, rates in bytes or tokens a second; made by `make_plan`.

    With a VRAM budget the dense weights, KV cache and workspace are in VRAM and `host_*` holds
    what the device slots do not; without one `vram_budget`, `device_*` and `vram_*` are 0.
    """

    ram_budget: int
    vram_budget: int
    placement: str  # "lru"
    dense_nbytes: int
    embedding_nbytes: int
    kv_nbytes: int
    workspace_nbytes: int
    total_experts: int
    slot_nbytes: int
    host_slots: int
    device_slots: int
    host_resident_share: float  # of all experts, in main memory
    device_resident_share: float  # of all experts, in VRAM
    disk_nbytes: int  # experts with no place in any memory
    hit_rate_assumed: float  # of the top tier; the share resident there, until a trace knows better
    ram_nbytes_per_token: int  # read from main memory by kernels
    vram_nbytes_per_token: int  # read from VRAM by kernels
    link_nbytes_per_token: int  # expected to be copied to the device
    disk_nbytes_per_token: int  # expected to be read from disk
    predicted_tok_s: float | None  # decode, by bandwidth alone; None where one is unknown
    bottleneck: str | None  # "disk", "ram", "link" or "vram": what takes most of that time
    ram_nbytes: int  # of the budget, what the plan uses
    vram_nbytes: int
    ram_available: int | None  # on the machine, when the plan was made

    @property
    def host_arena_nbytes(self) -> int:
        return self.host_slots * self.slot_nbytes

    @property
    def device_pool_nbytes(self) -> int:
        return self.device_slots * self.slot_nbytes

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
        return max(self.host_resident_share, self.device_resident_share)

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

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Every field and derived number, for `--json`."""
        derived = (
            "host_arena_nbytes",
            "device_pool_nbytes",
            "drop_cache",
            "resident_share",
            "ram_free",
            "vram_free",
            "ram_short",
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def make_plan(
    footprint: ModelFootprint,
    machine: Machine,
    ram_nbytes: int | None = None,
    vram_nbytes: int | None = None,
) -> MemoryPlan:
    """Divide the budgets: what must be there first, then as many experts as fit.

    `ram_nbytes` None takes 80% of the memory that the machine has available; `vram_nbytes` None
    or 0 plans without a device. Each tier needs slots for one token's experts of one layer.

    Predicted decode speed: each token reads from the memory of the top tier all dense weights and
    its own experts; those that the top tier misses come over the link or from disk first, and
    nothing overlaps:

        seconds = (dense + active) / top bandwidth + missed there / link + missed everywhere / disk

    The KV cache is left out, as is all compute; decode is bound by memory. With a device, main
    memory is taken to hold copies of what the device holds, so that shares do not add up.

    Raises OffloadError when a budget is too small, saying what is needed.
    """
    if ram_nbytes is None:
        if machine.ram_available is None:
            raise OffloadError(
                "cannot tell how much memory this machine has", "say it with `--ram`"
            )
        ram_nbytes = int(machine.ram_available * RAM_SHARE)
    vram_budget = vram_nbytes or 0
    on_device = footprint.dense_nbytes + footprint.kv_nbytes + footprint.workspace_nbytes
    ram_fixed = footprint.embedding_nbytes if vram_budget else footprint.fixed_nbytes
    vram_fixed = on_device if vram_budget else 0
    host_slots = _slots(footprint, ram_nbytes, ram_fixed, "RAM")
    device_slots = _slots(footprint, vram_budget, vram_fixed, "VRAM") if vram_budget else 0

    total = footprint.total_experts
    if device_slots == total:  # main memory is only passed through
        host_slots = footprint.experts_per_token
    in_memory = max(host_slots, device_slots)
    top_share = (device_slots or host_slots) / total
    active = footprint.active_expert_nbytes
    kernels_read = footprint.dense_nbytes + active
    disk_per_token = round(active * (total - in_memory) / total)
    link_per_token = round(active * (total - device_slots) / total) if vram_budget else 0
    tok_s, bottleneck = _predict(
        {
            "vram": (kernels_read if vram_budget else 0, machine.vram_bw),
            "ram": (0 if vram_budget else kernels_read, machine.ram_bw),
            "link": (link_per_token, machine.link_bw),
            "disk": (disk_per_token, machine.disk_bw),
        }
    )
    return MemoryPlan(
        ram_budget=ram_nbytes,
        vram_budget=vram_budget,
        placement="lru",
        dense_nbytes=footprint.dense_nbytes,
        embedding_nbytes=footprint.embedding_nbytes,
        kv_nbytes=footprint.kv_nbytes,
        workspace_nbytes=footprint.workspace_nbytes,
        total_experts=total,
        slot_nbytes=footprint.slot_nbytes,
        host_slots=host_slots,
        device_slots=device_slots,
        host_resident_share=host_slots / total,
        device_resident_share=device_slots / total,
        disk_nbytes=(total - in_memory) * footprint.expert_nbytes,
        hit_rate_assumed=top_share,
        ram_nbytes_per_token=0 if vram_budget else kernels_read,
        vram_nbytes_per_token=kernels_read if vram_budget else 0,
        link_nbytes_per_token=link_per_token,
        disk_nbytes_per_token=disk_per_token,
        predicted_tok_s=tok_s,
        bottleneck=bottleneck,
        ram_nbytes=ram_fixed + host_slots * footprint.slot_nbytes,
        vram_nbytes=vram_fixed + device_slots * footprint.slot_nbytes,
        ram_available=machine.ram_available,
    )


def _slots(footprint: ModelFootprint, budget: int, fixed: int, memory: str) -> int:
    """How many experts fit beside `fixed` bytes; OffloadError unless one token's of a layer do."""
    least = footprint.experts_per_token
    slots = (budget - fixed) // footprint.slot_nbytes
    if slots < least:
        needed = fixed + least * footprint.slot_nbytes
        flag = f"--{memory.lower()} {_gib(needed, roundup=True)}"
        raise OffloadError(
            f"{_gib(budget)} of {memory} are too little: the model needs {_gib(needed)} "
            f"({_gib(fixed)} that must be there, {_gib(needed - fixed)} for {least} experts)",
            f"give `{flag}` or more, or a shorter context with `--ctx`",
        )
    return min(slots, footprint.total_experts)


def _predict(
    lanes: dict[str, tuple[int, float | None]],
) -> tuple[float | None, str | None]:
    """Tokens a second and the slowest of the lanes (bytes, bandwidth), one after the other."""
    seconds: dict[str, float] = {}
    for name, (nbytes, bandwidth) in lanes.items():
        if not nbytes:
            continue
        if not bandwidth:
            return None, None
        seconds[name] = nbytes / bandwidth
    return 1 / sum(seconds.values()), max(seconds, key=lambda name: seconds[name])


def _gib(nbytes: int, roundup: bool = False) -> str:
    """A size for people, in MiB below one GiB; rounded up where it is a promise to fit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            hundredths = nbytes * 100 / unit
            return f"{(-(-nbytes * 100 // unit) if roundup else round(hundredths)) / 100:g}{name}"
    return f"{nbytes}B"


def largest_context(
    footprint_at: Callable[[int], ModelFootprint],
    machine: Machine,
    max_ctx: int,
    ram_nbytes: int | None = None,
    vram_nbytes: int | None = None,
) -> int | None:
    """The longest context, up to `max_ctx` tokens, whose plan fits; None when none does.

    `footprint_at(ctx)` gives the sizes at a context; they must not shrink as it grows.
    """

    def fits(ctx: int) -> bool:
        try:
            make_plan(footprint_at(ctx), machine, ram_nbytes, vram_nbytes)
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
