"""Knows how far plain torch operations go: rows of a weight are expanded to fp32 in a tile that
stays in cache, used, and forgotten; there is never a second copy of a weight.

Legend: T tokens, O out, I in features; g group size; G = I / g groups a row; R rows of a tile.
"""

import threading

import torch
from torch import Tensor

from quant.tensor import QuantizedWeight

# Weights of a tile: at most 1 MiB of fp32. Larger tiles leave the cache, smaller ones spend their
# time in calls (int4 at one token: 1.3 GB/s of packed bytes a core, against 0.8 at an eighth).
_TILE_VALUES = 1 << 18
_ROW_ALIGNMENT = 16  # rows of fp32 results that fill a cache line

_scratch = threading.local()


def linear_quantized(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x fp32 [T, I] -> fp32 [T, O]"""
    if weight.scheme.bits == 4:
        return _linear_int4(x, weight)
    return _linear_int8(x, weight)


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """x fp32 [T, I], weight [O, I] of any float dtype -> fp32 [T, O]"""
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight)
    out_features, in_features = weight.shape
    rows = _tile_rows(in_features)
    values = _buffer("values", rows * in_features, torch.float32, x.device).view(rows, in_features)
    out = x.new_zeros(x.shape[0], out_features)  # [T, O]
    for start in range(0, out_features, rows):
        source = weight[start : start + rows]  # [R, I]
        tile = values[: source.shape[0]].copy_(source)
        _add_product(out[:, start : start + rows], x, tile)
    return out


def _linear_int4(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """A byte holds an even and an odd column; each half is a matrix of its own, so that nothing
    has to be interleaved. The offset of 8 in every code is taken off group by group.
    """
    out_features, in_features = weight.out_features, weight.in_features
    groups, half_group = weight.scale.shape[1], weight.scheme.group_size // 2
    rows, half = _tile_rows(in_features), in_features // 2
    codes = _buffer("codes", rows * half, torch.uint8, x.device).view(rows, half)
    values = _buffer("values", rows * half, torch.float32, x.device).view(rows, half)
    scales = _buffer("scales", rows * groups, torch.float32, x.device).view(rows, groups)
    even, odd = x[:, 0::2].contiguous(), x[:, 1::2].contiguous()  # [T, I/2]
    offsets = x.view(x.shape[0], groups, 2 * half_group).sum(-1).mul_(-8.0)  # [T, G]
    source = weight.packed.view(torch.uint8)  # [O, I/2]
    out = x.new_zeros(x.shape[0], out_features)  # [T, O]
    for start in range(0, out_features, rows):
        byte, result = source[start : start + rows], out[:, start : start + rows]
        num_rows = byte.shape[0]
        code, tile = codes[:num_rows], values[:num_rows]  # [R, I/2]
        scale = scales[:num_rows].copy_(weight.scale[start : start + rows])  # [R, G]
        _add_product(result, offsets, scale)
        for column, split in ((even, _low_nibbles), (odd, _high_nibbles)):
            split(byte, code)
            tile.copy_(code)
            tile.view(num_rows, groups, half_group).mul_(scale.unsqueeze(-1))
            _add_product(result, column, tile)
    return out


def _linear_int8(x: Tensor, weight: QuantizedWeight) -> Tensor:
    out_features, in_features = weight.out_features, weight.in_features
    groups, group_size = weight.scale.shape[1], weight.scheme.group_size
    rows = _tile_rows(in_features)
    codes = _buffer("codes", rows * in_features, torch.uint8, x.device).view(rows, in_features)
    values = _buffer("values", rows * in_features, torch.float32, x.device).view(rows, in_features)
    scales = _buffer("scales", rows * groups, torch.float32, x.device).view(rows, groups)
    source = weight.packed.view(torch.uint8)  # [O, I]
    out = x.new_zeros(x.shape[0], out_features)  # [T, O]
    for start in range(0, out_features, rows):
        byte = source[start : start + rows]  # [R, I]
        num_rows = byte.shape[0]
        code, tile = codes[:num_rows], values[:num_rows]
        scale = scales[:num_rows].copy_(weight.scale[start : start + rows])  # [R, G]
        torch.bitwise_xor(byte, 0x80, out=code)
        tile.copy_(code.view(torch.int8))
        tile.view(num_rows, groups, group_size).mul_(scale.unsqueeze(-1))
        _add_product(out[:, start : start + rows], x, tile)
    return out


def _low_nibbles(byte: Tensor, out: Tensor) -> None:
    torch.bitwise_and(byte, 15, out=out)


def _high_nibbles(byte: Tensor, out: Tensor) -> None:
    torch.bitwise_right_shift(byte, 4, out=out)


def _add_product(result: Tensor, x: Tensor, tile: Tensor) -> None:
    """result [T, R] += x [T, I] @ tile [R, I]^T: this orientation is the fastest for few tokens."""
    result.addmm_(x, tile.t())


def _tile_rows(in_features: int) -> int:
    rows = _TILE_VALUES // in_features
    return max(_ROW_ALIGNMENT, rows - rows % _ROW_ALIGNMENT)


def _buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`size` values of scratch memory, kept between calls, one a thread, a name and a device."""
    key = f"{name} on {device}"
    buffer = getattr(_scratch, key, None)
    if buffer is None or buffer.numel() < size:
        # Inference tensors could not be written by a later call outside of inference mode.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype, device=device)
        setattr(_scratch, key, buffer)
    return buffer[:size]
