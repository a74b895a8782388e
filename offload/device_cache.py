"""Knows which experts lie in VRAM slots, as the device itself decides it while it decodes.

Legend: L MoE layers, E experts a layer, S slots, N choices of one step in one layer.

The bookkeeping of `table.SlotTable` under `policy.LruPolicy`, but in tensors on the device: a step
is `resolve` and `fetch` for every layer, neither of which waits for the host or is told anything
but tensors that stay where they are, so a captured graph can hold both. On the device "cpu" the
same calls keep the same promises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.device_ops import COMING, COUNT, PIECE_NBYTES
from offload.errors import OffloadError
from offload.keys import ExpertKey, describe

MAX_CHOICES = 64  # the kernel compares all pairs of them
PLACEMENTS = ("lru", "pinned")


@dataclass(frozen=True)
class LaneCounts:
    """How often an expert of a step was ready in a slot, and how the others were served."""

    hits: int = 0
    fetched: int = 0  # over the link into a slot
    linked: int = 0  # over the link, read by the kernel where it lies
    host: int = 0

    @property
    def requests(self) -> int:
        return self.hits + self.fetched + self.linked + self.host

    @property
    def hit_rate(self) -> float | None:
        """Share of requests met by a slot; None when there were none."""
        return self.hits / self.requests if self.requests else None

    def __add__(self, other: "LaneCounts") -> "LaneCounts":
        return LaneCounts(
            self.hits + other.hits,
            self.fetched + other.fetched,
            self.linked + other.linked,
            self.host + other.host,
        )


class DeviceCache:
    """S slots of one size on a device, shared by all layers; S may be 0.

    Placement "lru": what the link serves is fetched into the slots of the experts not asked for
    the longest; what finds no slot, because all of them are asked for now, is read in place.
    "pinned": slots are filled by `load` and never change; what the link serves is read in place.

    `host_addresses` int64 [L, E] is where the device can read an expert outside its own memory, 0
    where it cannot; sources are aligned to 16 bytes, and readable up to the next multiple of 16.
    Of m misses, the first `link_counts[m]` that have an address are served by the link, in the
    order asked. All others are the host's. With "lru" the link then brings `link_idle[m]` bytes
    more, of the expert that is on its way into a slot or else of the first that is the host's:
    so slots follow use even where the host serves every miss, at no cost to a step.
    `host_addresses` may be changed in place between steps.

    Raises OffloadError when the device has not that much memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        slot_nbytes: int,
        expert_nbytes: int,
        device: torch.device | str,
        host_addresses: Tensor,
        placement: str,
        link_counts: Tensor,
        link_idle: Sequence[int],
        max_choices: int,
    ) -> None:
        copy_nbytes = -(-expert_nbytes // PIECE_NBYTES) * PIECE_NBYTES
        assert placement in PLACEMENTS, f"no placement is called {placement}"
        assert host_addresses.shape == (num_layers, num_experts), "not one address an expert"
        assert slot_nbytes % PIECE_NBYTES == 0, f"slots of {slot_nbytes} bytes are not aligned"
        assert 0 < copy_nbytes <= slot_nbytes, f"{expert_nbytes} bytes in a slot of {slot_nbytes}"
        assert 1 <= max_choices <= MAX_CHOICES, f"{max_choices} choices at once"
        assert link_counts.numel() > max_choices < len(link_idle), "too few link counts"
        assert link_idle[0] == 0, "where nothing misses there is no time to be had"
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.expert_nbytes = expert_nbytes
        self.placement = placement
        self.max_choices = max_choices
        self.host_addresses = host_addresses.to(device, torch.int64).contiguous()  # [L, E]
        self.link_counts = link_counts.to(device, torch.int32).contiguous()  # [> N]
        pieces = [nbytes // PIECE_NBYTES for nbytes in link_idle]
        self._link_idle = torch.tensor(pieces, dtype=torch.int32, device=device)  # [> N]
        self._copy_nbytes = copy_nbytes
        self._admits = placement == "lru" and num_slots > 0
        self._slots = _allocate(num_slots * slot_nbytes, device)
        self._make_tables()

    def _make_tables(self) -> None:
        def table(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=self._slots.device)

        layers, experts, slots = self.num_layers, self.num_experts, self.num_slots
        self._slot_of = table(layers, experts, fill=-1, dtype=torch.int32)  # [L, E]; -1: absent
        self._owner = table(slots, fill=-1, dtype=torch.int32)  # [S] layer * E + expert; -1: free
        self._stamp = table(slots)  # [S] when it was last asked for; 0: free
        self._clock = table(1, fill=1)  # above every stamp
        self._counters = table(layers, 4)  # [L, 4] in the order of LaneCounts
        self._requests = table(layers, experts)  # [L, E]
        self._fetch_src = table(self.max_choices + 1)
        self._fetch_dst = table(self.max_choices + 1)
        self._fetch_count = table(2, dtype=torch.int32)
        self._arrival = table(4)  # see device_ops
        self._arrival[COMING] = -1
        self.step_addresses = table(experts)  # [E]; 0: the device does not read it
        self.host_mask = table(experts, dtype=torch.int32)  # [E]; 1: the host's

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes

    def resolve(self, layer_index: int, topk_ids: Tensor) -> None:
        """Fill `step_addresses` and `host_mask` for these choices, int64 of any shape.

        Slots that must change belong to their new experts from now on, and hold them from the next
        `fetch` on, which must come before the next `resolve`.
        """
        assert 0 <= layer_index < self.num_layers, f"no layer {layer_index}"
        assert topk_ids.dtype == torch.int64, f"choices of type {topk_ids.dtype}"
        assert topk_ids.is_contiguous(), "choices are not contiguous"
        assert 1 <= topk_ids.numel() <= self.max_choices, f"{topk_ids.numel()} choices"
        torch.ops.moecli_offload.resolve(
            topk_ids,
            layer_index,
            self._slot_of,
            self._owner,
            self._stamp,
            self._clock,
            self._counters,
            self._requests,
            self.host_addresses,
            self.link_counts,
            self._link_idle,
            self._slots,
            self.slot_nbytes,
            self._copy_nbytes // PIECE_NBYTES,
            self._admits,
            self.step_addresses,
            self.host_mask,
            self._fetch_src,
            self._fetch_dst,
            self._fetch_count,
            self._arrival,
        )

    def fetch(self) -> None:
        """Copy what the last `resolve` decided to fetch into its slots."""
        if self._admits:
            torch.ops.moecli_offload.fetch(
                self._fetch_src, self._fetch_dst, self._fetch_count, self._copy_nbytes, self._slots
            )

    def load(
        self, keys: Sequence[ExpertKey], read: Callable[[ExpertKey], bytes | memoryview]
    ) -> None:
        """Fill free slots with these experts, as if each had just been asked for, in this order.

        When `read` fails, no expert of this call is resident.
        """
        owner, stamp = self._owner.tolist(), self._stamp.tolist()
        free = [slot for slot in range(self.num_slots) if owner[slot] < 0 and not stamp[slot]]
        free = free[: len(keys)]
        numbers = [layer * self.num_experts + expert for layer, expert in keys]
        assert len(free) == len(keys), f"{len(keys)} experts for {len(free)} free slots"
        assert len({*numbers}) == len(numbers), "an expert is loaded twice"
        assert not {*numbers} & {*owner}, "an expert is loaded that is resident"
        for slot, key in zip(free, keys, strict=True):
            data = memoryview(read(key)).cast("B")
            assert data.nbytes >= self.expert_nbytes, f"{describe(key)} has {data.nbytes} bytes"
            self._slot(slot).copy_(_tensor(data[: self.expert_nbytes]))
        device = self._owner.device
        slots = torch.tensor(free, dtype=torch.int64, device=device)
        experts = torch.tensor(numbers, dtype=torch.int64, device=device)
        self._owner[slots] = experts.int()
        self._slot_of.view(-1)[experts] = slots.int()
        self._stamp[slots] = self._clock + torch.arange(len(keys), device=device)
        self._clock += len(keys)

    def _slot(self, slot: int) -> Tensor:
        """The bytes of the expert in a slot: uint8 [expert_nbytes]"""
        return self._slots.narrow(0, slot * self.slot_nbytes, self.expert_nbytes)

    def snapshot(self) -> dict[ExpertKey, int]:
        """Where each resident lies now. Waits for the device."""
        base = self._slots.data_ptr()
        return {
            divmod(number, self.num_experts): base + slot * self.slot_nbytes
            for slot, number in enumerate(self._owner.tolist())
            if number >= 0
        }

    def counters(self) -> list[LaneCounts]:
        """One for each layer, since the cache was made. Waits for the device."""
        return [LaneCounts(*counts) for counts in self._counters.tolist()]

    def requests(self) -> list[list[int]]:
        """How often each expert of each layer was asked for, in steps. Waits for the device."""
        requests: list[list[int]] = self._requests.tolist()
        return requests

    @property
    def num_arrived(self) -> int:
        """How many experts came to slots piece by piece, beside steps. Waits for the device."""
        return int(self._arrival[COUNT])

    def check_integrity(
        self, read: Callable[[ExpertKey], bytes | memoryview] | None = None
    ) -> None:
        """Assert that the tables agree and, with `read`, that residents hold their bytes."""
        slot_of, owner = self._slot_of.flatten().tolist(), self._owner.tolist()
        stamp, clock = self._stamp.tolist(), int(self._clock)
        for number, slot in enumerate(slot_of):
            key = divmod(number, self.num_experts)
            assert -1 <= slot < self.num_slots, f"{describe(key)} is in slot {slot}"
            assert slot < 0 or owner[slot] == number, f"slot {slot} does not own {describe(key)}"
        residents = [slot for slot in range(self.num_slots) if owner[slot] >= 0]
        located = [slot for slot in slot_of if slot >= 0]
        assert sorted(located) == residents, "a slot holds an expert that is elsewhere"
        coming, into, done = self._arrival.tolist()[:COUNT]
        taken = residents
        if coming >= 0:
            assert 0 <= done * PIECE_NBYTES < self._copy_nbytes, "what has come whole still comes"
            assert slot_of[coming] < 0, f"{describe(divmod(coming, self.num_experts))} comes twice"
            assert owner[into] < 0, f"slot {into} is not free for what comes into it"
            taken = [*residents, into]
        stamps = {stamp[slot] for slot in taken}
        assert len(stamps) == len(taken), "two experts were asked for at one time"
        assert all(0 < value < clock for value in stamps), "a stamp is not of the past"
        assert sum(stamp) == sum(stamps), "a free slot was asked for"
        if read is None:
            return
        whole = {slot: (owner[slot], self.expert_nbytes) for slot in residents}
        begun = {into: (coming, done * PIECE_NBYTES)} if coming >= 0 else {}
        for slot, (number, nbytes) in {**whole, **begun}.items():
            key = divmod(number, self.num_experts)
            blob = bytes(memoryview(read(key)).cast("B")[:nbytes])
            found = self._slot(slot)[:nbytes].cpu().numpy().tobytes()
            assert found == blob, f"{describe(key)} is damaged"

    def close(self) -> None:
        """Give the slots back; every address of them is dead from here on."""
        self._slots = self._slots.new_empty(0)


def _allocate(nbytes: int, device: torch.device | str) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)  # [S * slot_nbytes]
    except torch.OutOfMemoryError as error:
        raise OffloadError(
            f"`{device}` has no {nbytes / 2**30:.2f} GiB free for experts",
            "give a smaller budget with `--vram`",
        ) from error


def _tensor(data: memoryview) -> Tensor:
    writable = memoryview(bytearray(data)) if data.readonly else data  # torch warns otherwise
    return torch.frombuffer(writable, dtype=torch.uint8)
