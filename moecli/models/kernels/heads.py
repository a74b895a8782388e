"""Knows kernels of one token's attention: RoPE with the KV store, attention over a cache's slots.

Legend: N query heads, K key heads, D head size, R of it turned by RoPE, C slots, S splits of the
length.

Every launcher here takes the arguments of its op in moecli.models.fused. How many slots are seen is
read on the device, so that one launch is right for every length.
"""

# mypy: allow-untyped-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecli.models.kernels.rows import INTERPRETED
from quant.kernels.triton.card import card_of

# Bytes of a tile of keys, and slots at most: tiles of more would not fit the shared memory of the
# smallest cards, or leave room for one program only on the larger ones.
_TILE_NBYTES = 16 << 10
_MAX_SLOTS = 64
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _normalized(x, y, x_weight, y_weight, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of a head through one RMS norm."""
    scale = tl.rsqrt((tl.sum(x * x, axis=0) + tl.sum(y * y, axis=0)) / D + eps)
    x = (x * scale).to(DTYPE).to(tl.float32)
    y = (y * scale).to(DTYPE).to(tl.float32)
    x = (x * x_weight).to(DTYPE).to(tl.float32)
    y = (y * y_weight).to(DTYPE).to(tl.float32)
    return x, y


@triton.jit
def _positioned(
    source,  # [D]: a query or a key
    turns,  # fp32 [R / 2, 2]: cosines and sines
    norm_weight,  # [D]
    first,  # where the components of each pair are
    second,
    pair,
    mask,
    eps,
    D: tl.constexpr,
    TURNING: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """A head after norms and RoPE, as fp32 numbers that the compute dtype can hold."""
    DTYPE: tl.constexpr = source.dtype.element_ty
    x = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
    x_weight, y_weight = 1.0, 1.0
    if WEIGHTED:
        x_weight = tl.load(norm_weight + first, mask=mask, other=0.0).to(tl.float32)
        y_weight = tl.load(norm_weight + second, mask=mask, other=0.0).to(tl.float32)
    if NORM == "before":
        x, y = _normalized(x, y, x_weight, y_weight, eps, D, DTYPE)
    if ROPE != "none":
        turning = pair < TURNING // 2  # the others stay as they are
        cosine = tl.load(turns + 2 * pair, mask=turning, other=1.0)
        sine = tl.load(turns + 2 * pair + 1, mask=turning, other=0.0)
        turned = x * cosine - y * sine
        y = (y * cosine + x * sine).to(DTYPE).to(tl.float32)
        x = turned.to(DTYPE).to(tl.float32)
    if NORM == "after":
        x, y = _normalized(x, y, x_weight, y_weight, eps, D, DTYPE)
    return x, y


@triton.jit
def _rotate_and_store_kernel(
    queries,  # [N, D]
    keys,  # [K, D]
    values,  # [K, D]
    turns,
    temperature,  # fp32 [1]
    norm_weight,  # [N + K, D]
    slot_at,  # int64 [1]
    cache,  # [2, K, C, D]
    out,  # [N, D]
    num_heads,
    num_kv_heads,
    capacity,
    eps,
    D: tl.constexpr,
    TURNING: tl.constexpr,  # R: components that RoPE turns, the first ones
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    slot = tl.load(slot_at)  # int64
    pair = tl.arange(0, BLOCK)
    mask = pair < D // 2
    first, second = 2 * pair, 2 * pair + 1
    if ROPE == "half":
        first = tl.where(pair < TURNING // 2, pair, first)
        second = tl.where(pair < TURNING // 2, pair + TURNING // 2, second)
    if head < num_heads:
        x, y = _positioned(
            queries + head * D,
            turns,
            norm_weight + head * D,
            first,
            second,
            pair,
            mask,
            eps,
            D,
            TURNING,
            ROPE,
            NORM,
            WEIGHTED,
        )
        if TEMPERED:
            factor = tl.load(temperature)
            x = (x * factor).to(queries.dtype.element_ty).to(tl.float32)
            y = (y * factor).to(queries.dtype.element_ty).to(tl.float32)
        tl.store(out + head * D + first, x.to(out.dtype.element_ty), mask=mask)
        tl.store(out + head * D + second, y.to(out.dtype.element_ty), mask=mask)
    elif head < num_heads + num_kv_heads:
        row = head - num_heads
        x, y = _positioned(
            keys + row * D,
            turns,
            norm_weight + head * D,
            first,
            second,
            pair,
            mask,
            eps,
            D,
            TURNING,
            ROPE,
            NORM,
            WEIGHTED,
        )
        target = cache + (row.to(tl.int64) * capacity + slot) * D
        tl.store(target + first, x.to(cache.dtype.element_ty), mask=mask)
        tl.store(target + second, y.to(cache.dtype.element_ty), mask=mask)
    else:
        row = head - num_heads - num_kv_heads
        target = cache + ((num_kv_heads + row).to(tl.int64) * capacity + slot) * D
        x = tl.load(values + row * D + first, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(values + row * D + second, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + first, x.to(cache.dtype.element_ty), mask=mask)
        tl.store(target + second, y.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _attend_kernel(
    queries,  # [N, D]
    cache,  # [2, K, C, D]
    length,  # int64 [1]
    partial,  # fp32 [S, N, D]: not yet divided by the sums
    largest,  # fp32 [S, N]: scores, in powers of two
    sums,  # fp32 [S, N]
    num_kv_heads,
    group,  # N / K
    capacity,
    scale,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,  # dtype in which tiles are multiplied
    BLOCK_GROUP: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All query heads of one key head over one split: each key is read once."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    total = tl.load(length).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK_LENGTH) * BLOCK_LENGTH
    begin = split * share
    end = tl.minimum(begin + share, total)
    columns = tl.arange(0, BLOCK_D)
    members = tl.arange(0, BLOCK_GROUP)
    heads = kv_head * group + members
    column_mask = columns < D
    head_mask = (members < group)[:, None] & column_mask[None, :]
    q = tl.load(queries + heads[:, None] * D + columns[None, :], mask=head_mask, other=0.0).to(DOT)
    keys = cache + kv_head.to(tl.int64) * capacity * D
    values = cache + (num_kv_heads + kv_head).to(tl.int64) * capacity * D
    top = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_LENGTH):
        slots = start + tl.arange(0, BLOCK_LENGTH)
        seen = slots < end
        at = slots.to(tl.int64)[:, None] * D + columns[None, :]
        mask = seen[:, None] & column_mask[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0).to(DOT)
        v = tl.load(values + at, mask=mask, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None] + tl.dot(weights.to(DOT), v, input_precision="ieee")
        top = new_top
    row = split * num_kv_heads * group + heads
    tl.store(partial + row[:, None] * D + columns[None, :], acc, mask=head_mask)
    tl.store(largest + row, top, mask=members < group)
    tl.store(sums + row, weight_sum, mask=members < group)


@triton.jit
def _combine_kernel(
    partial,
    largest,
    sums,
    sinks,  # fp32 [N]: scores that take weight and give no value
    out,  # [N, D]
    num_heads,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head's splits become one; a split without slots has the sum 0 and the score -inf."""
    head = tl.program_id(0)
    splits = tl.arange(0, BLOCK_SPLITS)
    columns = tl.arange(0, BLOCK_D)
    split_mask = splits < SPLITS
    column_mask = columns < D
    rows = splits * num_heads + head
    tops = tl.load(largest + rows, mask=split_mask, other=-float("inf"))
    top = tl.max(tops, axis=0)
    total = 0.0
    if SINKS:
        sink = tl.load(sinks + head) * LOG2_E  # scores are powers of two here
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    shares = tl.exp2(tops - top)
    total += tl.sum(shares * tl.load(sums + rows, mask=split_mask, other=0.0), axis=0)
    mask = split_mask[:, None] & column_mask[None, :]
    parts = tl.load(partial + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * shares[:, None], axis=0) / total
    tl.store(out + head * D + columns, result.to(out.dtype.element_ty), mask=column_mask)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turns: Tensor,
    temperature: Tensor | None,
    norm_weight: Tensor | None,
    rope: str,
    norm: str,
    eps: float,
    slot: Tensor,
    keys_values: Tensor,
) -> Tensor:
    _, num_heads, size = q.shape
    _, num_kv_heads, capacity, _ = keys_values.shape
    assert keys_values.is_contiguous(), "a KV cache with gaps"
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q, dtype=keys_values.dtype)
    pairs = torch.view_as_real(turns)
    _rotate_and_store_kernel[(num_heads + 2 * num_kv_heads,)](
        *(q, k, v, pairs),
        pairs if temperature is None else temperature,
        q if norm_weight is None else norm_weight,
        *(slot, keys_values, out),
        *(num_heads, num_kv_heads, capacity, eps),
        D=size,
        TURNING=2 * turns.shape[-1],
        ROPE=rope,
        NORM=norm,
        WEIGHTED=norm_weight is not None,
        TEMPERED=temperature is not None,
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=1,
    )
    return out


def decode_attention(
    q: Tensor,
    keys_values: Tensor,
    length: Tensor,
    splits: int,
    dtype: torch.dtype,
    sinks: Tensor | None,
) -> Tensor:
    _, num_heads, size = q.shape
    _, num_kv_heads, capacity, _ = keys_values.shape
    assert keys_values.is_contiguous(), "a KV cache with gaps"
    group = num_heads // num_kv_heads
    partial = q.new_empty(splits, num_heads, size, dtype=torch.float32)
    largest, sums = q.new_empty(2, splits, num_heads, dtype=torch.float32)
    block_size = max(16, triton.next_power_of_2(size))
    dot = dot_dtype(keys_values)
    _attend_kernel[(num_kv_heads, splits)](
        *(q.contiguous(), keys_values, length, partial, largest, sums),
        *(num_kv_heads, group, capacity),
        LOG2_E.value * size**-0.5,
        D=size,
        SPLITS=splits,
        DOT=dot,
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        BLOCK_LENGTH=block_length(dot, block_size),
        BLOCK_D=block_size,
        num_stages=2,
    )
    return combine_splits(partial, largest, sums, dtype, sinks)


def combine_splits(
    partial: Tensor, largest: Tensor, sums: Tensor, dtype: torch.dtype, sinks: Tensor | None
) -> Tensor:
    """[1, N * D] of what splits found: partial fp32 [S, N, D], largest and sums fp32 [S, N]."""
    splits, num_heads, size = partial.shape
    out = partial.new_empty(1, num_heads * size, dtype=dtype)
    _combine_kernel[(num_heads,)](
        *(partial, largest, sums, sums if sinks is None else sinks, out, num_heads),
        D=size,
        SINKS=sinks is not None,
        SPLITS=splits,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        BLOCK_D=max(16, triton.next_power_of_2(size)),
    )
    return out


def block_length(dot: tl.dtype, block_size: int) -> int:
    """Slots that one turn of attention's loop looks at."""
    fitting = _TILE_NBYTES // (block_size * dot.primitive_bitwidth // 8)
    return max(16, min(_MAX_SLOTS, fitting))


def dot_dtype(cache: Tensor) -> tl.dtype:
    """Triton's interpreter cannot multiply bfloat16, and before sm_80 it uses no matrix units."""
    if INTERPRETED or card_of(cache.device).capability < 80:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(cache.dtype, tl.float32)
