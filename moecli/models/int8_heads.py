"""Knows keys or values that are stored as int8 with a scale for each token and head, and attention
over them on the processor.

Legend of the shapes: T new tokens, L tokens looked at, N query heads, K key heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16  # a number is rounded with its scale as it is stored
_LARGEST = 127
_BLOCK_TOKENS = 2048  # that are expanded at once: more would leave the processor's caches


@dataclass(frozen=True)
class Int8Heads:
    """Numbers times scales are keys, or values; both are views into the cache."""

    numbers: Tensor  # int8 [K, L, D]
    scales: Tensor  # [K, L]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[K, L, D] in `dtype`, which takes as many bytes more."""
        return self.numbers.to(dtype).mul_(self.scales.to(dtype)[..., None])


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> int8 numbers [..., D] and scales [...]; each vector keeps its largest number.

    The scale is one that `SCALE_DTYPE` holds, so its own rounding costs next to nothing.
    """
    x = x.float()
    scales = (x.abs().amax(dim=-1) / _LARGEST).to(SCALE_DTYPE)
    divisors = scales.float().where(scales > 0, 1.0)[..., None]
    return (x / divisors).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def attend_one(
    queries: Tensor, keys: Int8Heads, values: Int8Heads, sinks: Tensor | None = None
) -> Tensor:
    """Attention of the last of L tokens, scaled by D^-0.5, without expanding the cache as a whole.

    A scale belongs to a token, so it is multiplied into the score, or the weight, of that token.
    Shapes: queries [1, N, D], sinks fp32 [N], returns [1, N * D].
    """
    kv_heads, length, size = keys.numbers.shape
    grouped = queries.view(kv_heads, -1, size)  # [K, N / K, D]
    blocks = [slice(i, i + _BLOCK_TOKENS) for i in range(0, length, _BLOCK_TOKENS)]
    dtype = queries.dtype
    scores = torch.cat(
        [grouped @ keys.numbers[:, block].to(dtype).transpose(1, 2) for block in blocks], dim=-1
    )  # [K, N / K, L]
    scores = scores.float() * (keys.scales.float() * size**-0.5)[:, None]
    if sinks is None:
        shares = scores.softmax(dim=-1)
    else:
        with_sinks = torch.cat((scores, sinks.view(kv_heads, -1, 1)), dim=-1)
        shares = with_sinks.softmax(dim=-1)[..., :length]
    weights = (shares * values.scales.float()[:, None]).to(dtype)
    out = torch.zeros(grouped.shape, dtype=torch.float32)
    for block in blocks:
        out += weights[..., block] @ values.numbers[:, block].to(dtype)
    return out.reshape(1, -1).to(dtype)
