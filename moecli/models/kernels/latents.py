"""Knows the kernel of one token's attention over latents, which are key and value of all heads.

Legend: N heads, R rank of the latents, P numbers of a key besides, C slots, S splits of the length.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecli.models.kernels.heads import LOG2_E, combine_splits, dot_dtype
from quant.kernels.triton.card import card_of

_HEADS = 16  # of a program: the least that matrix units take
_HEADS_WITHOUT_UNITS = 8  # before sm_80 Triton uses none; with more, 64 KiB would not hold a tile
# Slots of a tile. A latent is several times as long as a key: with more, tiles and sums would not
# fit the shared memory and the registers.
_SLOTS = 16


@triton.jit
def _attend_latents_kernel(
    queries,  # [N, R + P]
    latents,  # [C, R + P]
    length,  # int64 [1]
    partial,  # fp32 [S, N, R]: not yet divided by the sums
    largest,  # fp32 [S, N]: scores, in powers of two
    sums,  # fp32 [S, N]
    num_heads,
    scale,
    RANK: tl.constexpr,
    REST: tl.constexpr,  # P
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,  # dtype in which tiles are multiplied
    BLOCK_HEADS: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Some heads over one split: a latent is read once for all of them, as key and as value."""
    SIZE: tl.constexpr = RANK + REST
    heads = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    split = tl.program_id(1)
    total = tl.load(length).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_LENGTH) * BLOCK_LENGTH
    begin = split * share
    end = tl.minimum(begin + share, total)
    columns = tl.arange(0, BLOCK_RANK)
    rest = RANK + tl.arange(0, BLOCK_REST)
    head_mask = heads < num_heads
    mask = head_mask[:, None] & (columns < RANK)[None, :]
    rest_mask = head_mask[:, None] & (rest < SIZE)[None, :]
    q = tl.load(queries + heads[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    q_rest = tl.load(queries + heads[:, None] * SIZE + rest[None, :], mask=rest_mask, other=0.0)
    q, q_rest = q.to(DOT), q_rest.to(DOT)
    top = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_HEADS], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_RANK], tl.float32)
    for start in range(begin, end, BLOCK_LENGTH):
        slots = start + tl.arange(0, BLOCK_LENGTH)
        seen = slots < end
        at = slots.to(tl.int64)[:, None] * SIZE
        here = seen[:, None] & (columns < RANK)[None, :]
        kept = tl.load(latents + at + columns[None, :], mask=here, other=0.0).to(DOT)
        here = seen[:, None] & (rest < SIZE)[None, :]
        kept_rest = tl.load(latents + at + rest[None, :], mask=here, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(kept), input_precision="ieee")
        scores = tl.dot(q_rest, tl.trans(kept_rest), scores, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None] + tl.dot(weights.to(DOT), kept, input_precision="ieee")
        top = new_top
    row = split * num_heads + heads
    tl.store(partial + row[:, None] * RANK + columns[None, :], acc, mask=mask)
    tl.store(largest + row, top, mask=head_mask)
    tl.store(sums + row, weight_sum, mask=head_mask)


def decode_latents(
    q: Tensor,
    latents: Tensor,
    length: Tensor,
    splits: int,
    rank: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    _, num_heads, size = q.shape
    assert latents.is_contiguous(), "latents with gaps"
    heads = _HEADS if card_of(q.device).capability >= 80 else _HEADS_WITHOUT_UNITS
    partial = q.new_empty(splits, num_heads, rank, dtype=torch.float32)
    largest, sums = q.new_empty(2, splits, num_heads, dtype=torch.float32)
    _attend_latents_kernel[(triton.cdiv(num_heads, heads), splits)](
        *(q.contiguous(), latents, length, partial, largest, sums),
        *(num_heads, LOG2_E.value * scale),
        RANK=rank,
        REST=size - rank,
        SPLITS=splits,
        DOT=dot_dtype(latents),
        BLOCK_HEADS=heads,
        BLOCK_LENGTH=_SLOTS,
        BLOCK_RANK=max(16, triton.next_power_of_2(rank)),
        BLOCK_REST=max(16, triton.next_power_of_2(size - rank)),
        num_stages=2,
    )
    return combine_splits(partial, largest, sums, dtype, None).view(1, num_heads, rank)
