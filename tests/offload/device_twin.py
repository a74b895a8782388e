"""A device's experts, and the host's own classes beside a device cache as its oracle."""

import ctypes
from collections.abc import Sequence

import torch

from offload.device_cache import DeviceCache, LaneCounts
from offload.keys import ExpertKey
from offload.policy import LruPolicy
from offload.table import SlotTable
from tests.devices import DEVICE, reachable

ALL_LINK = list(range(65))
NO_IDLE = [0] * 65  # nothing comes beside what is asked for
EXPERT_NBYTES = 37  # odd: the last piece of 16 bytes is not whole
PADDED_NBYTES = 48
SLOT_NBYTES = 64


class Experts:
    """The bytes of all experts in main memory, where the simulated device can read them."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (num_layers, num_experts, PADDED_NBYTES)
        memory = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.memory = reachable(memory)
        first = self.memory.data_ptr()
        assert first % 16 == 0
        numbers = torch.arange(num_layers * num_experts).view(num_layers, num_experts)
        self.addresses = first + numbers * PADDED_NBYTES  # [L, E]

    def read(self, key: ExpertKey) -> bytes:
        return self.memory[key].numpy().tobytes()[:EXPERT_NBYTES]

    def cache(
        self,
        num_slots: int,
        placement: str = "lru",
        counts: Sequence[int] = ALL_LINK,
        max_choices: int = 8,
        idle: Sequence[int] = NO_IDLE,
    ) -> DeviceCache:
        num_layers, num_experts = self.addresses.shape
        return DeviceCache(
            num_layers,
            num_experts,
            num_slots,
            SLOT_NBYTES,
            EXPERT_NBYTES,
            DEVICE,
            self.addresses.clone(),
            placement,
            torch.tensor(counts),
            idle,
            max_choices,
        )


def step(cache: DeviceCache, layer: int, experts: Sequence[int]) -> tuple[dict[int, int], set[int]]:
    """Resolve and fetch -> (expert -> address, experts of the host)"""
    cache.resolve(layer, torch.tensor(experts, device=DEVICE))
    cache.fetch()
    addresses = {e: a for e, a in enumerate(cache.step_addresses.tolist()) if a}
    return addresses, {e for e, mask in enumerate(cache.host_mask.tolist()) if mask}


def bytes_read(cache: DeviceCache, address: int) -> bytes:
    """What a kernel finds at the address of an expert: in a slot, or in main memory."""
    start = address - cache._slots.data_ptr()
    if 0 <= start < cache.nbytes:
        return cache._slots[start : start + EXPERT_NBYTES].cpu().numpy().tobytes()
    return ctypes.string_at(address, EXPERT_NBYTES)


class HostTwin:
    """What the host's own classes would do with the same requests.

    The expert that comes piece by piece is a pinned one that nobody has yet: a place of its own in
    the order, that is evicted when it is the oldest.
    """

    def __init__(self, cache: DeviceCache, idle: Sequence[int] = NO_IDLE) -> None:
        self.cache = cache
        self.idle = idle
        self.counts = {layer: LaneCounts() for layer in range(cache.num_layers)}
        self.table: SlotTable | None = None
        self.admits = cache.placement == "lru"
        self.coming: ExpertKey | None = None
        self.num_pieces = 0  # of it
        self.num_arrived = 0
        if cache.num_slots:
            base = cache._slots.data_ptr()
            places = [base + slot * cache.slot_nbytes for slot in range(cache.num_slots)]
            self.table = SlotTable(LruPolicy(cache.num_slots), places)

    def load(self, keys: Sequence[ExpertKey]) -> None:
        for layer, expert in keys:
            self.acquire(layer, [expert])

    def acquire(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        if self.table is None:
            return {}
        got = self.table.acquire(layer, experts)
        assert got is not None
        addresses, held, missing = got
        for entry in missing:
            self.table.finish(entry)
        self.table.unpin(held)
        return addresses

    def residents(self) -> dict[ExpertKey, int]:
        entries = self.table.entries if self.table else {}
        return {key: entry.address for key, entry in entries.items() if key != self.coming}

    def step(self, layer: int, experts: Sequence[int]) -> tuple[dict[int, int], set[int]]:
        asked = list(dict.fromkeys(experts))
        here = self.cache.host_addresses[layer].tolist()
        residents = self.residents()
        hits = {e: residents[layer, e] for e in asked if (layer, e) in residents}
        misses = [e for e in asked if e not in hits]
        reachable = [e for e in misses if here[e]]
        linked = reachable[: int(self.cache.link_counts[len(misses)])]
        room = self.cache.num_slots - len(hits) if self.admits else 0
        fetched = linked[:room]
        addresses = {e: here[e] for e in linked[room:]} | hits
        if self.admits:
            idle = self.idle[len(misses)] // 16
            self.forget_lost({(layer, e) for e in linked})
            self.acquire(layer, list(hits))
            begins = reachable[len(linked) : room][:1] if idle and self.coming is None else []
            addresses |= self.acquire(layer, fetched)
            if self.table and self.coming not in self.table.entries:
                self.coming = None  # it was the oldest
            if begins:
                self.acquire(layer, begins)
                self.coming, self.num_pieces = (layer, begins[0]), 0
            if self.coming is not None:
                self.num_pieces = min(self.num_pieces + idle, PADDED_NBYTES // 16)
            if self.coming is not None and self.num_pieces == PADDED_NBYTES // 16:
                self.coming, self.num_arrived = None, self.num_arrived + 1
        host = set(misses) - set(linked)
        lanes = (len(hits), len(fetched), len(linked) - len(fetched), len(host))
        self.counts[layer] += LaneCounts(*lanes)
        return addresses, host

    def forget_lost(self, linked: set[ExpertKey]) -> None:
        """The link brings it whole, or the device reads it no more: its slot is free."""
        if self.coming is None:
            return
        if self.coming in linked or not self.cache.host_addresses[self.coming]:
            assert self.table is not None
            self.table._drop(self.table.entries[self.coming])
            self.coming = None
