"""Knows the cases of what moves experts: the cache on the device, fetches, copies, the doorbell.

Legend: L MoE layers, E experts a layer, S slots, T tokens, k choices a token, H hidden.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moecli.checks.compare import Mismatch, equal, kernels_chosen, random
from moecli.selfcheck import Case
from offload.device_cache import DeviceCache
from offload.host import HostArena
from offload.host_lane import HostLane
from offload.pieces import Piece, copy_pieces
from offload.pinning import CudaPinner, Pinner, SimulatedPinner
from offload.slots import SlotPool
from quant.kernels.experts import memory_at

_LAYERS, _EXPERTS, _CHOICES = 2, 8, 4
_SLOT_NBYTES = 5 * 4096
_UNREACHABLE = 3  # the expert of each layer that only the host can serve
_LINK_COUNTS = [0, 1, 1, 2, 3, *range(4, 64)]
_LINK_IDLE = [0, 4096, *[3 * 4096] * 62]  # so an expert comes piece by piece as well
_STEPS = 10
_HOST = torch.device("cpu")


def pinner_of(device: torch.device) -> Pinner:
    return CudaPinner(device) if device.type == "cuda" else SimulatedPinner()


@contextmanager
def pinned_slots(device: torch.device, count: int, slot_nbytes: int) -> Iterator[HostArena]:
    """An arena that the device can read. Raises Mismatch where the system pins none of it."""
    arena = HostArena(count * slot_nbytes, slot_nbytes, hugepages=False)
    try:
        if arena.pin(pinner_of(device)) < count:
            raise Mismatch(f"the system pins no {count * slot_nbytes} bytes")
        yield arena
    finally:
        arena.close()


@contextmanager
def _cache(
    device: torch.device, num_slots: int, placement: str, expert_nbytes: int = _SLOT_NBYTES
) -> Iterator[tuple[DeviceCache, HostArena]]:
    """A cache over experts in pinned memory, whose bytes all differ."""
    with pinned_slots(device, _LAYERS * _EXPERTS, _SLOT_NBYTES) as arena:
        addresses = torch.zeros(_LAYERS, _EXPERTS, dtype=torch.int64)  # [L, E]
        for slot in range(arena.num_slots):
            values = random(_SLOT_NBYTES // 4, seed=slot)
            ctypes.memmove(arena.address(slot), values.data_ptr(), _SLOT_NBYTES)
            addresses[divmod(slot, _EXPERTS)] = arena.device_address(slot)
        addresses[:, _UNREACHABLE] = 0
        cache = DeviceCache(
            *(_LAYERS, _EXPERTS, num_slots, _SLOT_NBYTES, expert_nbytes, device, addresses),
            *(placement, torch.tensor(_LINK_COUNTS, dtype=torch.int32), _LINK_IDLE, 2 * _CHOICES),
        )
        cache._slots.fill_(0xA5)  # else memory of an earlier cache may have the right bytes already
        try:
            yield cache, arena
        finally:
            cache.close()


def _bytes(arena: HostArena, layer_index: int, expert: int) -> bytes:
    return ctypes.string_at(arena.address(layer_index * _EXPERTS + expert), _SLOT_NBYTES)


def routing(step: int, layer_index: int) -> Tensor:
    """What two tokens choose, int64 [2, _CHOICES]; experts come back now and then."""
    return random(2, _EXPERTS, seed=31 * step + layer_index).topk(_CHOICES).indices


def resolve(device: torch.device) -> None:
    """Many steps on the device, and the same on the processor: the same places, step by step."""
    cpu = torch.device("cpu")
    for placement, num_slots in (("lru", 6), ("lru", 0), ("pinned", 5)):
        with (
            _cache(device, num_slots, placement) as (fast, _),
            _cache(cpu, num_slots, placement) as (plain, arena),
        ):
            if placement == "pinned":
                keys = [(0, 1), (1, 2), (1, _UNREACHABLE), (0, 6)]
                for cache in (fast, plain):
                    cache.load(keys, lambda key: _bytes(arena, *key))
            for step, layer_index in ((i // _LAYERS, i % _LAYERS) for i in range(_STEPS)):
                ids = routing(step, layer_index)
                with kernels_chosen(device):
                    fast.resolve(layer_index, ids.to(device))
                    fast.fetch()
                plain.resolve(layer_index, ids)
                plain.fetch()
                what = f"{placement}, {num_slots} slots, step {step}"
                equal(f"{what}: host mask", fast.host_mask, plain.host_mask)
                equal(f"{what}: places", _places(fast, layer_index), _places(plain, layer_index))
                if fast.snapshot().keys() != plain.snapshot().keys():
                    raise Mismatch(f"{what}: other experts are resident")
            if fast.counters() != plain.counters() or fast.num_arrived != plain.num_arrived:
                raise Mismatch(f"{placement}, {num_slots} slots: the counters differ")
            fast.check_integrity()


def _places(cache: DeviceCache, layer_index: int) -> Tensor:
    """Where each expert is read this step, int64 [E]: 0 nowhere, 1 its slot, 2 main memory."""
    slots, found = cache.snapshot(), torch.zeros(_EXPERTS, dtype=torch.int64)
    homes = cache.host_addresses[layer_index].tolist()
    for expert, address in enumerate(cache.step_addresses.tolist()):
        if address and address == slots.get((layer_index, expert)):
            found[expert] = 1
        elif address:
            found[expert] = 2 if address == homes[expert] else -1
    return found


def fetch(device: torch.device) -> None:
    """Experts of an odd size in slots, byte for byte what main memory holds."""
    for expert_nbytes in (_SLOT_NBYTES, _SLOT_NBYTES - 16 * 37):
        with _cache(device, 6, "lru", expert_nbytes) as (cache, arena):
            for step in range(4):
                for layer_index in range(_LAYERS):
                    with kernels_chosen(device):
                        cache.resolve(layer_index, routing(step, layer_index).to(device))
                        cache.fetch()
            if not cache.snapshot() or not cache.num_arrived:
                raise Mismatch("nothing was fetched")
            try:
                cache.check_integrity(lambda key: _bytes(arena, *key))
            except AssertionError as error:
                raise Mismatch(str(error)) from error


def parts(device: torch.device) -> None:
    """Runs of an expert that lie apart, at odd places, copied to theirs in a slot and no others."""
    wanted = (Piece(5, 1000), Piece(4096, 300, 20, 700))
    with pinned_slots(device, 2, _SLOT_NBYTES) as arena:
        pool = SlotPool(2, _SLOT_NBYTES, device, pieces=wanted)
        try:
            for slot in range(2):
                values = random(_SLOT_NBYTES // 4, seed=slot)
                ctypes.memmove(arena.address(slot), values.data_ptr(), _SLOT_NBYTES)
                target = memory_at(pool.address(1 - slot), _SLOT_NBYTES, device)
                expected = target.cpu().clone()  # whatever lies there
                copy_pieces(expected, memory_at(arena.address(slot), _SLOT_NBYTES, _HOST), wanted)
                with arena.buffer(slot) as buffer:
                    pool.copy_in(1 - slot, buffer)
                equal(f"slot {1 - slot}", target.cpu(), expected)
        finally:
            pool.close()


def doorbell(device: torch.device) -> None:
    """Requests that the host answers in full, in part, and such that ask for nothing."""
    hidden, ids = random(2, 96, seed=1).bfloat16(), torch.tensor([[1, 2], [2, 5]])
    weights = random(2, 2, seed=2)
    asked: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def serve(
        layer_index: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, dict[int, int] | None]:
        asked.append((layer_index, x.clone(), topk_ids.clone(), topk_weights.clone(), mask.clone()))
        return (x * 2 if layer_index != 1 else None), ({5: 4096} if layer_index else None)

    lane = HostLane(96, _EXPERTS, 2, 2, serve, device, pinner_of(device))
    mask = torch.zeros(_EXPERTS, dtype=torch.int32)
    mask[2] = 1
    none = torch.zeros(_EXPERTS, dtype=torch.int64)
    table = none.clone()
    table[5] = 4096
    double = hidden.float() * 2
    expected = [(double, none), (double * 0, table), (double, table), (double * 0, none)]
    try:
        with kernels_chosen(device), lane.armed():
            for layer_index, (partial, addresses) in enumerate(expected):
                masked = mask if layer_index < 3 else mask * 0
                lane.ring(layer_index, *(t.to(device) for t in (hidden, ids, weights, masked)))
                found = lane.wait()
                equal(f"sum of request {layer_index}", found[0], partial)
                equal(f"addresses of request {layer_index}", found[1], addresses)
    finally:
        lane.close()
    if [request[0] for request in asked] != [0, 1, 2]:
        raise Mismatch(f"the host was asked for layers {[request[0] for request in asked]}")
    for request in asked:
        for what, sent, came in zip(
            ("hidden", "ids", "weights", "mask"),
            (hidden.float(), ids, weights, mask),
            request[1:],
            strict=True,
        ):
            equal(f"{what} that reached the host", came, sent)


def lane_cases() -> Iterator[Case]:
    yield Case("kernels", "the cache's bookkeeping", resolve)
    yield Case("fetch", "experts copied into slots", fetch)
    yield Case("doorbell", "requests to the host", doorbell)
    yield Case("parts", "parts of experts copied into slots", parts)
