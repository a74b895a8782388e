"""Knows the device's side of the host lane as two ops: ring the host, and await what it replies.

`torch.ops.moecli_offload.lane_ring` and `lane_wait` read and write a mailbox in main memory (see
offload.mailbox), whose areas they get as addresses. On CUDA they are launches of
offload.kernels.doorbell, which a CUDA graph can hold; on the simulated device "cpu" they are plain
PyTorch, or, after `interpret_kernels`, the same kernels in Triton's interpreter.
"""

import time
from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import Tensor

from offload.mailbox import (
    HAS_ADDRESSES,
    HAS_PARTIAL,
    ReplyAddresses,
    RequestAddresses,
    tensor_at,
    word_at,
)

# Words of `state`, int64 on the device.
SEQUENCE, OPEN, FAILED = 0, 1, 2  # number of the last request; it is open; the host once failed
NUM_STATE_WORDS = 3
_NAP_S = 20e-6
_interpreted = False


def interpret_kernels(enabled: bool) -> None:
    """Whether CPU tensors go through the Triton kernels too: only in Triton's interpreter."""
    global _interpreted
    _interpreted = enabled


def ring(
    hidden: Tensor,  # [T, H], any float
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k], any float
    host_mask: Tensor,  # int32 [E]
    state: Tensor,  # int64 [3], written
    request: RequestAddresses,
    layer_index: int,
) -> None:
    """Ask the host to see to the masked experts; where none is masked, nothing is asked."""
    torch.ops.moecli_offload.lane_ring(
        hidden, topk_ids, topk_weights, host_mask, state, list(astuple(request)), layer_index
    )


def wait(
    state: Tensor,  # int64 [3], written
    partial: Tensor,  # fp32 [T, H], written
    addresses: Tensor,  # int64 [E], written
    reply: ReplyAddresses,
    max_spins: int,
) -> None:
    """Take the reply to the last `ring`, once it is there; zeros where nothing was asked.

    Gives up after `max_spins` looks: then zeros too, and nothing is asked any more.
    """
    torch.ops.moecli_offload.lane_wait(state, partial, addresses, list(astuple(reply)), max_spins)


def _ring_reference(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    host_mask: Tensor,
    state: Tensor,
    to: RequestAddresses,
    layer_index: int,
) -> None:
    asked = bool(host_mask.any()) and not state[FAILED]
    state[OPEN] = asked
    if not asked:
        return
    for address, dtype, values in (
        (to.header, torch.int64, torch.tensor([layer_index, hidden.shape[0]])),
        (to.hidden, torch.float32, hidden),
        (to.topk_ids, torch.int64, topk_ids),
        (to.topk_weights, torch.float32, topk_weights),
        (to.mask, torch.int32, host_mask),
    ):
        tensor_at(address, tuple(values.shape), dtype).copy_(values)
    state[SEQUENCE] += 1
    word_at(to.bell).value = int(state[SEQUENCE])


def _wait_reference(
    state: Tensor, partial: Tensor, addresses: Tensor, reply: ReplyAddresses, max_spins: int
) -> None:
    partial.zero_()
    addresses.zero_()
    if not state[OPEN]:
        return
    number, answered = int(state[SEQUENCE]), word_at(reply.answered)
    for _ in range(max_spins):
        if answered.value >= number:
            break
        time.sleep(_NAP_S)  # lets the host's thread run, which may share this core
    if answered.value < number:
        state[OPEN], state[FAILED] = 0, 1
        word_at(reply.fault).value = number
        return
    parts = word_at(reply.parts).value
    if parts & HAS_PARTIAL:
        partial.copy_(tensor_at(reply.partial, tuple(partial.shape), torch.float32))
    if parts & HAS_ADDRESSES:
        addresses.copy_(tensor_at(reply.addresses, tuple(addresses.shape), torch.int64))


def _ring_kernels(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    host_mask: Tensor,
    state: Tensor,
    request: list[int],
    layer_index: int,
) -> None:
    from offload.kernels import doorbell

    to = RequestAddresses(*request)
    doorbell.ring(hidden, topk_ids, topk_weights, host_mask, state, to, layer_index)


def _wait_kernels(
    state: Tensor, partial: Tensor, addresses: Tensor, reply: list[int], max_spins: int
) -> None:
    from offload.kernels import doorbell

    doorbell.wait(state, partial, addresses, ReplyAddresses(*reply), max_spins)


def _ring_cpu(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    host_mask: Tensor,
    state: Tensor,
    request: list[int],
    layer_index: int,
) -> None:
    if _interpreted:
        _ring_kernels(hidden, topk_ids, topk_weights, host_mask, state, request, layer_index)
    else:
        to = RequestAddresses(*request)
        _ring_reference(hidden, topk_ids, topk_weights, host_mask, state, to, layer_index)


def _wait_cpu(
    state: Tensor, partial: Tensor, addresses: Tensor, reply: list[int], max_spins: int
) -> None:
    if _interpreted:
        _wait_kernels(state, partial, addresses, reply, max_spins)
    else:
        _wait_reference(state, partial, addresses, ReplyAddresses(*reply), max_spins)


def _no_shape(*arguments: object) -> None:
    """Both write into what they are given and return nothing."""


_OPS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "lane_ring(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor host_mask, "
    "Tensor(a!) state, int[] request, int layer_index) -> ()": (_ring_cpu, _ring_kernels),
    "lane_wait(Tensor(a!) state, Tensor(b!) partial, Tensor(c!) addresses, int[] reply, "
    "int max_spins) -> ()": (_wait_cpu, _wait_kernels),
}
_library = torch.library.Library("moecli_offload", "FRAGMENT")  # shared with the device's cache
for _schema, (_on_cpu, _on_cuda) in _OPS.items():
    _name = _library.define(_schema)
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"moecli_offload::{_name}", _no_shape, lib=_library)
