"""Knows how a kernel rings the host, and waits for it, through memory that both see.

Four launches, in this order on one stream: what the host shall read is written by one and
announced by the next, what it replies is awaited by one and read by the next. The end of a kernel
makes its writes visible to what follows on the stream; nothing here relies on the order of writes
within a kernel. Areas in main memory come as addresses (see offload.mailbox).

`state` is int64 [3] on the device: the number of the last request, whether it is open, and whether
the host once failed to answer; then nothing is asked any more until the host resets it.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from offload.mailbox import HAS_ADDRESSES, HAS_PARTIAL, ReplyAddresses, RequestAddresses

_SEQUENCE, _OPEN, _FAILED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_PARTIAL, _ADDRESSES = tl.constexpr(HAS_PARTIAL), tl.constexpr(HAS_ADDRESSES)
_BLOCK = 1024


def ring(
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    host_mask: Tensor,  # int32 [E]
    state: Tensor,
    to: RequestAddresses,
    layer_index: int,
) -> None:
    """Two launches: write the request, ring the bell; nothing where no expert is masked."""
    num_experts = host_mask.numel()
    block_experts = triton.next_power_of_2(num_experts)
    _write_request[(triton.cdiv(hidden.numel(), _BLOCK),)](
        *(hidden, topk_ids, topk_weights, host_mask, state),
        *(to.header, to.hidden, to.topk_ids, to.topk_weights, to.mask),
        *(layer_index, hidden.shape[0], hidden.numel(), topk_ids.numel(), num_experts),
        BLOCK=_BLOCK,
        BLOCK_CHOICES=triton.next_power_of_2(topk_ids.numel()),
        BLOCK_EXPERTS=block_experts,
    )
    _ring_bell[(1,)](host_mask, state, to.bell, num_experts, block_experts, num_warps=1)


def wait(
    state: Tensor,
    partial: Tensor,  # fp32 [T, H]
    addresses: Tensor,  # int64 [E]
    reply: ReplyAddresses,
    max_spins: int,
) -> None:
    """Two launches: await the reply, take it; zeros where nothing was asked or no reply came."""
    _await_reply[(1,)](state, reply.answered, reply.fault, max_spins, num_warps=1)
    _take_reply[(triton.cdiv(partial.numel(), _BLOCK),)](
        *(state, reply.parts, reply.partial, reply.addresses),
        *(partial, addresses, partial.numel(), addresses.numel()),
        BLOCK=_BLOCK,
        BLOCK_EXPERTS=triton.next_power_of_2(addresses.numel()),
    )


@triton.jit
def _is_asked(mask, state, num_experts, BLOCK_EXPERTS: tl.constexpr):
    expert = tl.arange(0, BLOCK_EXPERTS)
    masked = tl.load(mask + expert, mask=expert < num_experts, other=0)
    return (tl.max((masked != 0).to(tl.int32), axis=0) != 0) & (tl.load(state + _FAILED) == 0)


@triton.jit(do_not_specialize=["layer_index", "num_tokens"])
def _write_request(
    hidden,  # [T, H], any float
    topk_ids,  # int64 [T, k]
    topk_weights,  # [T, k], any float
    mask,  # int32 [E]
    state,  # int64 [3]
    to_header,
    to_hidden,
    to_ids,
    to_weights,
    to_mask,
    layer_index,
    num_tokens,
    num_values,
    num_choices,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    if _is_asked(mask, state, num_experts, BLOCK_EXPERTS):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_values
        values = tl.load(hidden + at, mask=inside)
        to = to_hidden.to(tl.pointer_type(tl.float32)) + at
        to = tl.max_contiguous(tl.multiple_of(to, 16), BLOCK)  # areas begin at whole lines
        tl.store(to, values.to(tl.float32), mask=inside)
        if tl.program_id(0) == 0:
            choice = tl.arange(0, BLOCK_CHOICES)
            is_choice = choice < num_choices
            ids = tl.load(topk_ids + choice, mask=is_choice)
            weights = tl.load(topk_weights + choice, mask=is_choice).to(tl.float32)
            tl.store(to_ids.to(tl.pointer_type(tl.int64)) + choice, ids, mask=is_choice)
            tl.store(to_weights.to(tl.pointer_type(tl.float32)) + choice, weights, mask=is_choice)
            expert = tl.arange(0, BLOCK_EXPERTS)
            is_expert = expert < num_experts
            masked = tl.load(mask + expert, mask=is_expert)
            tl.store(to_mask.to(tl.pointer_type(tl.int32)) + expert, masked, mask=is_expert)
            header = to_header.to(tl.pointer_type(tl.int64))
            tl.store(header, layer_index.to(tl.int64))
            tl.store(header + 1, num_tokens.to(tl.int64))


@triton.jit
def _ring_bell(mask, state, bell, num_experts, BLOCK_EXPERTS: tl.constexpr):
    asked = _is_asked(mask, state, num_experts, BLOCK_EXPERTS)
    tl.store(state + _OPEN, asked.to(tl.int64))
    if asked:
        # An atomic of system scope on the counter is the fence between the request and the bell.
        one = tl.full((), 1, tl.int64)
        number = tl.atomic_add(state + _SEQUENCE, one, sem="acq_rel", scope="sys") + 1
        tl.store(bell.to(tl.pointer_type(tl.int64)), number, cache_modifier=".wt")


@triton.jit
def _await_reply(state, answered, fault, max_spins):
    if tl.load(state + _OPEN) != 0:
        number = tl.load(state + _SEQUENCE)
        word = answered.to(tl.pointer_type(tl.int64))
        last = tl.load(word, volatile=True)
        spins = 0
        while (last < number) & (spins < max_spins):
            last = tl.load(word, volatile=True)
            spins += 1
        # Again an atomic as a fence, between the look that saw the reply and those that read it.
        came = (last >= number).to(tl.int64)
        tl.atomic_xchg(state + _OPEN, came, sem="acq_rel", scope="sys")
        if last < number:
            tl.store(state + _FAILED, 1 - came)
            tl.store(fault.to(tl.pointer_type(tl.int64)), number, cache_modifier=".wt")


@triton.jit
def _take_reply(
    state,  # int64 [3]
    parts,
    from_partial,
    from_addresses,
    partial,  # fp32 [T, H]
    addresses,  # int64 [E]
    num_values,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    given = tl.full((), 0, tl.int64)
    if tl.load(state + _OPEN) != 0:
        given = tl.load(parts.to(tl.pointer_type(tl.int64)), volatile=True)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = from_partial.to(tl.pointer_type(tl.float32)) + at
    source = tl.max_contiguous(tl.multiple_of(source, 16), BLOCK)
    is_here = at < tl.where((given & _PARTIAL) != 0, num_values, 0)
    values = tl.load(source, mask=is_here, other=0.0, cache_modifier=".cv")
    tl.store(partial + at, values, mask=at < num_values)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, BLOCK_EXPERTS)
        table = from_addresses.to(tl.pointer_type(tl.int64)) + expert
        is_given = expert < tl.where((given & _ADDRESSES) != 0, num_experts, 0)
        found = tl.load(table, mask=is_given, other=0, cache_modifier=".cv")
        tl.store(addresses + expert, found, mask=expert < num_experts)
