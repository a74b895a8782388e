"""Knows how signed integers lie in 32-bit words (compressed-tensors `pack-quantized`); no scales.

u = q + 2^(bits-1); element j of a row sits in word j // (32/bits) at bit (j % (32/bits)) * bits.
On a little-endian machine that is: 4 bits, byte b = u[2b] | u[2b+1] << 4; 8 bits, byte = u.
"""

import sys

import torch
from torch import Tensor

assert sys.byteorder == "little", "packed words are read as little-endian bytes"


def pack(q: Tensor, bits: int) -> Tensor:
    """Signed values to words: int8 [O, I] -> int32 [O, I * bits / 32]."""
    assert q.dtype == torch.int8, f"cannot pack {q.dtype}"
    assert q.shape[1] * bits % 32 == 0, f"rows of {q.shape[1]} values do not fill words"
    if bits == 8:
        return (q.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
    assert bits == 4, f"cannot pack {bits} bits"
    u = (q + 8).view(torch.uint8)  # [O, I]
    return (u[:, 0::2] | (u[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Words to signed values: int32 [O, I * bits / 32] -> int8 [O, I]."""
    assert words.dtype == torch.int32, f"packed words are int32, not {words.dtype}"
    assert words.shape[1] * 32 == in_features * bits, (
        f"{words.shape[1]} words of {bits}-bit values are not {in_features} values"
    )
    byte = words.contiguous().view(torch.uint8)  # [O, I * bits / 8]
    if bits == 8:
        return (byte ^ 0x80).view(torch.int8)
    assert bits == 4, f"cannot unpack {bits} bits"
    nibbles = torch.stack((byte & 0xF, byte >> 4), dim=-1)  # [O, I/2, 2]
    return nibbles.view(torch.int8).view(words.shape[0], in_features) - 8
