"""Knows the kernel of many tokens' attention where a window bounds what they see, or sinks take a
part of their weight: what torch's own kernels do not know.

Legend: T new tokens, L tokens looked at, N query heads, K key heads, D head size.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecli.models.kernels.heads import LOG2_E, block_length, dot_dtype
from quant.kernels.triton.card import card_of

_TOKENS = 64  # of a program
_TOKENS_WITHOUT_UNITS = 16  # before sm_80 Triton uses no matrix units: tiles must fit the registers


@triton.jit
def _attend_many_kernel(
    queries,  # [T, N, D]
    keys,  # [K, L, D], heads `key_stride` apart
    values,  # [K, L, D], likewise
    sinks,  # fp32 [N]
    out,  # [T, N, D]
    num_tokens,
    length,
    num_heads,
    group,  # N / K
    key_stride,
    value_stride,
    window,
    scale,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    DOT: tl.constexpr,  # dtype in which tiles are multiplied
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some tokens of one query head over all that they see, tile by tile."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, BLOCK_D)
    places = length - num_tokens + rows  # of these tokens among the keys
    mask = (rows < num_tokens)[:, None] & (columns < D)[None, :]
    at = (rows.to(tl.int64)[:, None] * num_heads + head) * D + columns[None, :]
    q = tl.load(queries + at, mask=mask, other=0.0).to(DOT)
    keys += (head // group).to(tl.int64) * key_stride
    values += (head // group).to(tl.int64) * value_stride
    top = tl.full([BLOCK_TOKENS], -float("inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_TOKENS], tl.float32)
    if SINKS:  # a score as the others are, in powers of two, with a value of zeros
        top = tl.zeros([BLOCK_TOKENS], tl.float32) + tl.load(sinks + head) * LOG2_E
        weight_sum += 1.0
    acc = tl.zeros([BLOCK_TOKENS, BLOCK_D], tl.float32)
    first = length - num_tokens + tl.program_id(0) * BLOCK_TOKENS
    begin = 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_LENGTH * BLOCK_LENGTH
    for start in range(begin, tl.minimum(first + BLOCK_TOKENS, length), BLOCK_LENGTH):
        slots = start + tl.arange(0, BLOCK_LENGTH)
        here = (slots < length)[:, None] & (columns < D)[None, :]
        kept = slots.to(tl.int64)[:, None] * D + columns[None, :]
        k = tl.load(keys + kept, mask=here, other=0.0).to(DOT)
        v = tl.load(values + kept, mask=here, other=0.0).to(DOT)
        seen = slots[None, :] <= places[:, None]
        if WINDOWED:
            seen &= slots[None, :] > places[:, None] - window
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # Of a token that has seen nothing yet nothing fades: -inf less itself is no number.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None] + tl.dot(weights.to(DOT), v, input_precision="ieee")
        top = new_top
    result = acc / weight_sum[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def windowed_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    num_tokens, num_heads, size = q.shape
    kv_heads, length, _ = keys.shape
    assert keys.stride()[1:] == values.stride()[1:] == (size, 1), "keys or values with gaps"
    out = torch.empty(num_tokens, num_heads * size, dtype=q.dtype, device=q.device)
    block_size, dot = max(16, triton.next_power_of_2(size)), dot_dtype(keys)
    wide = card_of(q.device).capability >= 80
    block_tokens = _TOKENS if wide else _TOKENS_WITHOUT_UNITS
    _attend_many_kernel[(triton.cdiv(num_tokens, block_tokens), num_heads)](
        *(q.contiguous(), keys, values, q if sinks is None else sinks, out),
        *(num_tokens, length, num_heads, num_heads // kv_heads),
        *(keys.stride(0), values.stride(0), window or 0, LOG2_E.value * size**-0.5),
        D=size,
        WINDOWED=window is not None,
        SINKS=sinks is not None,
        DOT=dot,
        BLOCK_TOKENS=block_tokens,
        BLOCK_LENGTH=block_length(dot, block_size),
        BLOCK_D=block_size,
        num_stages=2,
    )
    return out
