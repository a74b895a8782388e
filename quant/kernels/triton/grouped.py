"""Knows how many tokens go through their experts: choices are sorted by expert on the device, and
every expert is multiplied with all of its choices at once; knows nothing of how experts came there.

Legend: T tokens, k choices a token, N = T * k choices, E experts, B blocks of choices, H hidden,
I intermediate, of which S count; C codes a word.

Nothing is asked of the device: there are as many blocks as the worst routing needs, and those that
this routing leaves empty end at once. A choice depends on its token and its expert alone, and sums
over k are in order, so that results depend neither on timing nor on what other tokens chose.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.triton.card import OPTIONS
from quant.kernels.triton.choices import activated, add_choices, bias_at, biased, bytes_of
from quant.kernels.triton.codes import signed_code
from quant.kernels.triton.linear import (
    BAND,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    banded,
    dot,
    load_plane,
    load_weight,
    planes_of,
    product,
    tile_at,
    token_block,
    widen,
)
from quant.layout import ExpertLayout
from quant.scheme import WORD_BITS

WORKSPACE_NBYTES = 256 << 20  # tokens are taken in as many passes as this makes necessary
_CHOICE_NBYTES = 96  # to sort a choice: sorted ids, order, counts; and what the sort itself needs


@dataclass(frozen=True)
class _Sorted:
    """Choices by expert, in blocks of one expert each."""

    order: Tensor  # int64 [N]: which choice stands at each place
    ends: Tensor  # int64 [E]: the place after the last choice of each expert
    expert: Tensor  # int64 [B]: of each block; E: the block is empty
    start: Tensor  # int64 [B]: the place where each block begins


def workspace_nbytes(num_tokens: int, top_k: int, layout: ExpertLayout, itemsize: int) -> int:
    """The most that `add_routed_experts` allocates, for activations of `itemsize` bytes.

    T' * (H * itemsize + k * (I * itemsize + H * 4 + 96)), where T' is how many of the T tokens one
    pass takes: all, or as many as keep this within WORKSPACE_NBYTES.
    """
    tokens = min(num_tokens, _pass_tokens(top_k, layout, itemsize))
    return tokens * _token_nbytes(top_k, layout, itemsize)


def add_routed_experts(
    out: Tensor,  # fp32 [T, H], contiguous
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E], multiples of 16; 0: not here
    layout: ExpertLayout,
    *,
    activation: str,
    weight_on_input: bool,
    span: tuple[int, int],
    biases: Tensor | None = None,  # fp32 [E, 2 I + H]
) -> None:
    """out += what the choices contribute whose expert is here.

    Weights are rounded to hidden's dtype, and so is what lies between gate, up and down, which for
    fp16 is bf16.
    """
    options = {"WEIGHT_ON_INPUT": weight_on_input, "BIASED": biased(biases, layout.hidden_size)}
    of_expert = (addresses, addresses if biases is None else biases)
    tokens = _pass_tokens(topk_ids.shape[1], layout, hidden.itemsize)
    for start in range(0, topk_ids.shape[0], tokens):
        part = slice(start, start + tokens)
        _add_pass(
            out[part],
            hidden[part],
            topk_ids[part],
            topk_weights[part],
            of_expert,
            layout,
            activation,
            span,
            options,
        )


def _add_pass(
    out: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    of_expert: tuple[Tensor, Tensor],  # addresses, and biases or anything where there are none
    layout: ExpertLayout,
    activation: str,
    span: tuple[int, int],
    known: dict[str, int],  # what both kernels are told of weights and biases
) -> None:
    addresses = of_expert[0]
    top_k, num_experts = topk_ids.shape[1], addresses.numel()
    hidden_size, size, bits = layout.hidden_size, span[1] - span[0], layout.scheme.bits
    # One choice a token may lie with gaps, which flattening keeps.
    ids, weights = (chosen.flatten().contiguous() for chosen in (topk_ids, topk_weights))  # [N]
    block_tokens = token_block(triton.cdiv(ids.numel(), num_experts), hidden)
    choices = _sort(ids, addresses, block_tokens)
    blocks = choices.expert.numel()
    act = hidden.new_empty(ids.numel(), size, dtype=_between(hidden.dtype))  # [N, C, S / C]
    contributions = out.new_empty(ids.numel(), hidden_size)  # fp32 [N, H], by choice
    table = (weights, choices.order, choices.ends, choices.expert, choices.start, *of_expert)
    options = (
        _constants(layout, span)
        | known
        | {
            "NUM_EXPERTS": num_experts,
            "BLOCK_TOKENS": block_tokens,
            **OPTIONS,
        }
    )
    _gate_up_kernel[(banded(size) * blocks,)](
        *(act, planes_of(hidden, bits, hidden.dtype), *table, blocks),
        TOP_K=top_k,
        ACTIVATION=activation,
        WIDEN=widen(hidden.dtype),
        # Of 8-bit codes one tile less is on its way: with it, shared memory of 100 KiB, as most
        # cards have, would hold one program where the registers hold two.
        num_stages=2 if bits == 8 else 3,
        **options,
    )
    _down_kernel[(banded(hidden_size) * blocks,)](
        *(contributions, act, *table, blocks), WIDEN=widen(act.dtype), **options
    )
    add_choices(out, contributions, ids.view(-1, top_k), addresses)


def _between(dtype: torch.dtype) -> torch.dtype:
    """What lies between gate, up and down may be far larger than what fp16 can hold."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _sort(ids: Tensor, addresses: Tensor, block_tokens: int) -> _Sorted:
    """Choices of experts that are not here are sorted too, but are in no block."""
    num_experts, num_choices = addresses.numel(), ids.numel()
    # At worst every expert has a block with a single choice; no block is without one.
    blocks = min(num_choices, (num_choices + num_experts * (block_tokens - 1)) // block_tokens)
    order = ids.argsort(stable=True)
    counts = torch.zeros_like(addresses).scatter_add_(0, ids, torch.ones_like(ids))  # [E]
    ends = counts.cumsum(0)
    per_expert = torch.where(addresses == 0, 0, (counts + block_tokens - 1) // block_tokens)
    block_ends = per_expert.cumsum(0)  # [E]
    block = torch.arange(blocks, device=ids.device)  # [B]
    expert = torch.searchsorted(block_ends, block, right=True)
    known = expert.clamp(max=num_experts - 1)
    in_expert = block - (block_ends - per_expert)[known]
    return _Sorted(order, ends, expert, (ends - counts)[known] + in_expert * block_tokens)


def _token_nbytes(top_k: int, layout: ExpertLayout, itemsize: int) -> int:
    """Workspace of one token: its planes, and of its choices act, contribution and sorting."""
    hidden_size, intermediate_size = layout.hidden_size, layout.intermediate_size
    choice = intermediate_size * itemsize + hidden_size * 4 + _CHOICE_NBYTES
    return hidden_size * itemsize + top_k * choice


def _pass_tokens(top_k: int, layout: ExpertLayout, itemsize: int) -> int:
    return max(1, WORKSPACE_NBYTES // _token_nbytes(top_k, layout, itemsize))


def _constants(layout: ExpertLayout, span: tuple[int, int]) -> dict[str, int]:
    """What both kernels must know of an expert's bytes, and how they divide it into tiles."""
    return {
        "HIDDEN": layout.hidden_size,
        "INTERMEDIATE": layout.intermediate_size,
        "BEGIN": span[0],
        "SPAN": span[1] - span[0],
        **bytes_of(layout),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_WORDS": BLOCK_COLUMNS * layout.scheme.bits // WORD_BITS,
        "BAND": BAND,
    }


@triton.jit
def _rows_at(
    address,  # int64: where the weight's words begin; a multiple of 16
    row,
    word,  # of each row the first one that counts, and the first of its group
    rows,  # [rows], from `row` on
    ROW_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
):
    """Pointers to that word and to its scale, of each row."""
    first = row * ROW_WORDS + word
    words = address.to(tl.pointer_type(tl.int32)) + first
    scales = (address + PACKED_NBYTES).to(tl.pointer_type(tl.bfloat16)) + first // GROUP_WORDS
    # Nothing is known of a pointer that was a number; said here, loads are 16 bytes wide.
    words = tl.multiple_of(words, 16)
    return words + rows * ROW_WORDS, scales + rows * (ROW_WORDS // GROUP_WORDS)


@triton.jit(do_not_specialize=["blocks"])
def _gate_up_kernel(
    act,  # [N, C, S / C], by place
    planes,  # [T, C, H / C]
    weights,  # [N], by choice
    order,  # int64 [N]
    ends,  # int64 [E]
    experts,  # int64 [B]
    starts,  # int64 [B]
    addresses,  # int64 [E]
    biases,  # fp32 [E, 2 I + H]
    blocks,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr,  # I of the biases; 0: there are none
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
    PROJECTION_NBYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows of gate and of up times the choices of a block, and their activation."""
    CODES: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // CODES
    WORDS: tl.constexpr = HIDDEN // CODES
    row_block, block = tile_at(tl.program_id(0), blocks, BAND)
    expert = tl.load(experts + block)
    if (expert < NUM_EXPERTS) & (row_block * BLOCK_ROWS < SPAN):
        address = tl.load(addresses + expert)
        first, rows = row_block * BLOCK_ROWS, tl.arange(0, BLOCK_ROWS)
        row = first + rows
        has_row = row < SPAN
        place = tl.load(starts + block) + tl.arange(0, BLOCK_TOKENS)
        here = place < tl.load(ends + expert)
        choice = tl.load(order + place, here, other=0)
        x = planes + choice // TOP_K * HIDDEN
        gate_words, gate_scales = _rows_at(
            *(address, BEGIN + first, 0, rows, WORDS, GROUP_WORDS, PACKED_NBYTES)
        )
        up_words, up_scales = _rows_at(
            *(address + PROJECTION_NBYTES, BEGIN + first, 0, rows),
            *(WORDS, GROUP_WORDS, PACKED_NBYTES),
        )
        gate = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
        for start in range(0, WORDS, BLOCK_WORDS):
            gate_packed, gate_scale = load_weight(
                gate_words, gate_scales, has_row, start, WORDS, BLOCK_WORDS, GROUP_WORDS
            )
            up_packed, up_scale = load_weight(
                up_words, up_scales, has_row, start, WORDS, BLOCK_WORDS, GROUP_WORDS
            )
            for index in tl.static_range(CODES):
                part = load_plane(x + index * WORDS, here, start, WORDS, BLOCK_WORDS)
                gate = dot(signed_code(gate_packed, index, BITS) * gate_scale, part, gate, WIDEN)
                up = dot(signed_code(up_packed, index, BITS) * up_scale, part, up, WIDEN)
        weight = tl.load(weights + choice, here, other=0.0).to(tl.float32)[None, :]
        if WEIGHT_ON_INPUT:
            gate *= weight
            up *= weight
        if BIASED > 0:
            begun = BEGIN + row
            of_gate = bias_at(biases, expert, begun, has_row, 0, HIDDEN, BIASED)
            of_up = bias_at(biases, expert, begun, has_row, 1, HIDDEN, BIASED)
            gate += of_gate[:, None]
            up += of_up[:, None]
        value = activated(gate, up, ACTIVATION)
        if not WEIGHT_ON_INPUT:  # of the output, which is linear in this
            value *= weight
        plane = row % CODES * (SPAN // CODES) + row // CODES
        tl.store(
            act + place[None, :] * SPAN + plane[:, None],
            value.to(act.dtype.element_ty),
            here[None, :] & has_row[:, None],
        )


@triton.jit(do_not_specialize=["blocks"])
def _down_kernel(
    contributions,  # fp32 [N, H], by choice
    act,  # [N, C, S / C], by place
    weights,  # [N], by choice
    order,  # int64 [N]
    ends,  # int64 [E]
    experts,  # int64 [B]
    starts,  # int64 [B]
    addresses,  # int64 [E]
    biases,  # fp32 [E, 2 I + H]
    blocks,
    WEIGHT_ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr,  # I of the biases; 0: there are none
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
    PROJECTION_NBYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows of down, of which the span counts, times the activations of a block."""
    CODES: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // CODES
    row_block, block = tile_at(tl.program_id(0), blocks, BAND)
    expert = tl.load(experts + block)
    if (expert < NUM_EXPERTS) & (row_block * BLOCK_ROWS < HIDDEN):
        first, rows = row_block * BLOCK_ROWS, tl.arange(0, BLOCK_ROWS)
        row = first + rows
        has_row = row < HIDDEN
        place = tl.load(starts + block) + tl.arange(0, BLOCK_TOKENS)
        here = place < tl.load(ends + expert)
        words, scales = _rows_at(
            tl.load(addresses + expert) + 2 * PROJECTION_NBYTES,
            *(first, BEGIN // CODES, rows, INTERMEDIATE // CODES, GROUP_WORDS, PACKED_NBYTES),
        )
        total = product(
            *(act + place * SPAN, here, words, scales, has_row, 0, SPAN // CODES, SPAN // CODES),
            *(BITS, GROUP_WORDS, BLOCK_TOKENS, BLOCK_ROWS, BLOCK_WORDS, WIDEN),
        )
        choice = tl.load(order + place, here, other=0)
        if BIASED > 0 and BEGIN == 0:  # so that spans add up
            bias = bias_at(biases, expert, row, has_row, 2, HIDDEN, BIASED)[:, None]
            if not WEIGHT_ON_INPUT:
                bias = bias * tl.load(weights + choice, here, other=0.0).to(tl.float32)[None, :]
            total += bias
        tl.store(
            contributions + choice[None, :] * HIDDEN + row[:, None],
            total,
            here[None, :] & has_row[:, None],
        )
