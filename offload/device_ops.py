"""Knows the two ops of a device cache: schema, shape function, PyTorch reference, and who computes.

Legend: L MoE layers, E experts a layer, S slots, N choices.

`torch.ops.moecli_offload.*` write into their arguments and return nothing, so that a captured step
replays them on the same tensors. References wait for the device, so no graph can capture them.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload.errors import OffloadError

BACKENDS = ("auto", "torch", "triton")
PIECE_NBYTES = 16  # experts are copied in pieces of this size
# Words of `arrival`: the expert, layer * E + expert, that comes piece by piece while the host
# computes, -1: none; its slot; its pieces that are there; how many experts have come so.
COMING, INTO, DONE, COUNT = 0, 1, 2, 3
_backend = "auto"


def set_backend(name: str) -> None:
    """Choose who computes from now on; "auto" is Triton on a GPU and PyTorch elsewhere."""
    global _backend
    if name not in BACKENDS:
        raise OffloadError(f"no kernels are called `{name}`", f"use one of {', '.join(BACKENDS)}")
    _backend = name


def current_backend() -> str:
    return _backend


def _resolve(
    topk_ids: Tensor,  # int64, N in all
    layer_index: int,
    slot_of: Tensor,  # int32 [L, E]
    owner: Tensor,  # int32 [S]
    stamp: Tensor,  # int64 [S]
    clock: Tensor,  # int64 [1]
    counters: Tensor,  # int64 [L, 4]
    requests: Tensor,  # int64 [L, E]
    host_addresses: Tensor,  # int64 [L, E]
    link_counts: Tensor,  # int32 [> N]
    link_idle: Tensor,  # int32 [> N]
    slots: Tensor,  # uint8 [S * slot_nbytes]
    slot_nbytes: int,
    num_pieces: int,
    admit: bool,
    step_addresses: Tensor,  # int64 [E]
    host_mask: Tensor,  # int32 [E]
    fetch_src: Tensor,  # int64 [> N]
    fetch_dst: Tensor,  # int64 [> N]
    fetch_count: Tensor,  # int32 [2]
    arrival: Tensor,  # int64 [4]
) -> None:
    """Where each expert asked for is read in this step; `DeviceCache` says by which rules."""
    ids = topk_ids.flatten().tolist()
    asked = list(dict.fromkeys(ids))  # in the order asked
    residents, here = slot_of[layer_index], host_addresses[layer_index].tolist()  # [E]
    hits = [expert for expert in asked if residents[expert] >= 0]
    misses = [expert for expert in asked if expert not in hits]
    reachable = [expert for expert in misses if here[expert]]
    linked = reachable[: int(link_counts[len(misses)])]
    room = owner.numel() - len(hits)
    fetched = linked[:room] if admit else []
    idle = int(link_idle[len(misses)])
    if admit:
        first, now = layer_index * len(here), int(clock)  # number of this layer's first expert
        stamps = {expert: now + ids.index(expert) for expert in asked}
        slots_of, homes = slot_of.view(-1), host_addresses.view(-1)  # [L * E]
        for expert in hits:
            stamp[residents[expert]] = stamps[expert]
        coming = int(arrival[COMING])
        if coming >= 0 and (not homes[coming] or coming - first in linked):
            stamp[arrival[INTO]], arrival[COMING] = 0, -1
        begins = reachable[len(linked) : room][:1] if idle and arrival[COMING] < 0 else []
        for expert in fetched:
            slot = _take_oldest(stamps[expert] + len(ids), slots_of, owner, stamp, arrival)
            slots_of[first + expert], owner[slot] = slot, first + expert
        for expert in begins:
            slot = _take_oldest(stamps[expert] + len(ids), slots_of, owner, stamp, arrival)
            owner[slot] = -1
            arrival[:COUNT] = torch.tensor([first + expert, slot, 0])
        clock += 2 * len(ids)
    step_addresses.zero_()
    host_mask.zero_()
    for expert in asked:
        if expert in hits or expert in fetched:
            step_addresses[expert] = slots.data_ptr() + int(residents[expert]) * slot_nbytes
        elif expert in linked:
            step_addresses[expert] = here[expert]
        else:
            host_mask[expert] = 1
    for turn, expert in enumerate(fetched):
        fetch_src[turn], fetch_dst[turn] = here[expert], step_addresses[expert]
    fetch_count[0], fetch_count[1] = len(fetched), 0
    if admit and arrival[COMING] >= 0:
        coming, slot, done = arrival[:COUNT].tolist()
        fetch_src[len(fetched)] = homes[coming] + done * PIECE_NBYTES
        fetch_dst[len(fetched)] = slots.data_ptr() + slot * slot_nbytes + done * PIECE_NBYTES
        fetch_count[1] = min(idle, num_pieces - done)
        arrival[DONE] += fetch_count[1]
        if arrival[DONE] == num_pieces:
            slots_of[coming], owner[slot], arrival[COMING] = slot, coming, -1
            arrival[COUNT] += 1
    num_zero_copy, num_host = len(linked) - len(fetched), len(misses) - len(linked)
    lanes = (len(hits), len(fetched), num_zero_copy, num_host)
    counters[layer_index] += torch.tensor(lanes, device=counters.device)
    requests[layer_index, asked] += 1


def _take_oldest(now: int, slot_of: Tensor, owner: Tensor, stamp: Tensor, arrival: Tensor) -> int:
    """The oldest slot, now stamped `now`, which nobody owns any more; slot_of [L * E]."""
    slot = int(stamp.argmin())  # the first of equals: free slots have stamp 0
    if owner[slot] >= 0:
        slot_of[owner[slot]] = -1
    elif arrival[COMING] >= 0 and arrival[INTO] == slot:
        arrival[COMING] = -1
    stamp[slot] = now
    return slot


def _fetch(src: Tensor, dst: Tensor, count: Tensor, nbytes: int, slots: Tensor) -> None:
    """Copy `nbytes` (a multiple of 16) from each source to its destination within `slots`.

    `count`, int32 [2]: of so many sources, and of the one after them so many pieces of 16 bytes.
    """
    num_whole, num_pieces = count.tolist()
    lengths = [nbytes] * num_whole + [num_pieces * PIECE_NBYTES] * (num_pieces > 0)
    for source, target, length in zip(src.tolist(), dst.tolist(), lengths, strict=False):
        memory = (ctypes.c_uint8 * length).from_address(source)
        start = target - slots.data_ptr()
        slots[start : start + length].copy_(torch.frombuffer(memory, dtype=torch.uint8))


def _resolve_kernel() -> Callable[..., None]:
    from offload.kernels.resolve import resolve

    return resolve


def _fetch_kernel() -> Callable[..., None]:
    from offload.kernels.fetch import fetch

    return fetch


def _use_kernels(tensor: Tensor) -> bool:
    if _backend == "triton" and not tensor.is_cuda:
        import triton

        if not triton.knobs.runtime.interpret:
            raise OffloadError(
                f"Triton's kernels do not run on `{tensor.device}`",
                "set TRITON_INTERPRET=1 to interpret them",
            )
    return _backend == "triton" or (_backend == "auto" and tensor.is_cuda)


def _compute(
    kernel: Callable[[], Callable[..., None]], reference: Callable[..., None], *arguments: Any
) -> None:
    run = kernel() if _use_kernels(arguments[0]) else reference
    run(*arguments)


def _shape(*arguments: Any) -> None:
    """These ops return nothing."""


_OPS = {
    "resolve(Tensor topk_ids, int layer_index, Tensor(a!) slot_of, Tensor(b!) owner, "
    "Tensor(c!) stamp, Tensor(d!) clock, Tensor(e!) counters, Tensor(f!) requests, "
    "Tensor host_addresses, Tensor link_counts, Tensor link_idle, Tensor slots, "
    "int slot_nbytes, int num_pieces, bool admit, Tensor(g!) step_addresses, "
    "Tensor(h!) host_mask, Tensor(i!) fetch_src, Tensor(j!) fetch_dst, "
    "Tensor(k!) fetch_count, Tensor(l!) arrival) -> ()": partial(
        _compute, _resolve_kernel, _resolve
    ),
    "fetch(Tensor src, Tensor dst, Tensor count, int nbytes, Tensor(a!) slots) -> ()": partial(
        _compute, _fetch_kernel, _fetch
    ),
}
_library = torch.library.Library("moecli_offload", "DEF")
for _schema, _run in _OPS.items():
    _name = _library.define(_schema)
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"moecli_offload::{_name}", _shape, lib=_library)
