"""Knows how far plain torch operations go: rows of a weight are expanded to fp32 in a tile that
stays in cache, used, and forgotten; there is never a second copy of a weight.

Legend: T tokens, O out, I in features; g group size; G = I / g groups a row; R rows of a tile.
"""

import threading

import torch
from torch import Tensor

from quant.tensor import QuantizedWeight

# fp32 values of a tile: 512 KiB, so that the tile and its bytes fit a 1 MiB cache.
_TILE_VALUES = 1 << 17
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
    values = _buffer("values", rows * in_features, torch.float32).view(rows, in_features)
    x_t = x.t()  # [I, T]
    out = x.new_empty(out_features, x.shape[0])  # [O, T]
    for start in range(0, out_features, rows):
        source = weight[start : start + rows]  # [R, I]
        tile = values[: source.shape[0]].copy_(source)
        _multiply(tile, x_t, out[start : start + rows])
    return out.t().contiguous()


def _linear_int4(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """A byte holds an even and an odd column; each half is a matrix of its own, so that nothing
    has to be interleaved. The offset of 8 in every code is taken off at the end, group by group.
    """
    out_features, in_features = weight.out_features, weight.in_features
    groups, half_group = weight.scale.shape[1], weight.scheme.group_size // 2
    rows, half = _tile_rows(in_features), in_features // 2
    nibbles = _buffer("nibbles", rows * half, torch.uint8).view(rows, half)
    values = _buffer("values", rows * half, torch.float32).view(rows, half)
    scales = _buffer("scales", rows * groups, torch.float32).view(rows, groups)
    even, odd = x[:, 0::2].t().contiguous(), x[:, 1::2].t().contiguous()  # [I/2, T]
    sums = x.view(x.shape[0], groups, 2 * half_group).sum(-1).mul_(-8.0).t().contiguous()  # [G, T]
    source = weight.packed.view(torch.uint8)  # [O, I/2]
    out = x.new_empty(out_features, x.shape[0])  # [O, T]
    for start in range(0, out_features, rows):
        byte = source[start : start + rows]  # [R, I/2]
        num_rows = byte.shape[0]
        code, tile, result = nibbles[:num_rows], values[:num_rows], out[start : start + rows]
        scale = scales[:num_rows].copy_(weight.scale[start : start + rows])  # [R, G]
        _multiply(scale, sums, result)
        for column, split in ((even, _low_nibbles), (odd, _high_nibbles)):
            split(byte, code)
            tile.copy_(code)
            tile.view(num_rows, groups, half_group).mul_(scale.unsqueeze(-1))
            _multiply(tile, column, result, accumulate=True)
    return out.t().contiguous()


def _linear_int8(x: Tensor, weight: QuantizedWeight) -> Tensor:
    out_features, in_features = weight.out_features, weight.in_features
    groups, group_size = weight.scale.shape[1], weight.scheme.group_size
    rows = _tile_rows(in_features)
    signed = _buffer("nibbles", rows * in_features, torch.uint8).view(rows, in_features)
    values = _buffer("values", rows * in_features, torch.float32).view(rows, in_features)
    scales = _buffer("scales", rows * groups, torch.float32).view(rows, groups)
    x_t = x.t().contiguous()  # [I, T]
    source = weight.packed.view(torch.uint8)  # [O, I]
    out = x.new_empty(out_features, x.shape[0])  # [O, T]
    for start in range(0, out_features, rows):
        byte = source[start : start + rows]  # [R, I]
        num_rows = byte.shape[0]
        code, tile = signed[:num_rows], values[:num_rows]
        scale = scales[:num_rows].copy_(weight.scale[start : start + rows])  # [R, G]
        torch.bitwise_xor(byte, 0x80, out=code)
        tile.copy_(code.view(torch.int8))
        tile.view(num_rows, groups, group_size).mul_(scale.unsqueeze(-1))
        _multiply(tile, x_t, out[start : start + rows])
    return out.t().contiguous()


def _low_nibbles(byte: Tensor, out: Tensor) -> None:
    torch.bitwise_and(byte, 15, out=out)


def _high_nibbles(byte: Tensor, out: Tensor) -> None:
    torch.bitwise_right_shift(byte, 4, out=out)


def _multiply(tile: Tensor, x_t: Tensor, result: Tensor, accumulate: bool = False) -> None:
    """result [R, T] = or += tile [R, I] @ x_t [I, T]"""
    beta = 1.0 if accumulate else 0.0
    if x_t.shape[1] == 1:
        row = result[:, 0]
        torch.addmv(row, tile, x_t[:, 0], beta=beta, out=row)
    else:
        torch.addmm(result, tile, x_t, beta=beta, out=result)


def _tile_rows(in_features: int) -> int:
    rows = _TILE_VALUES // in_features
    return max(_ROW_ALIGNMENT, rows - rows % _ROW_ALIGNMENT)


def _buffer(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """`size` values of scratch memory, kept between calls, one a thread and a name."""
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.numel() < size:
        # Inference tensors could not be written by a later call outside of inference mode.
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype)
        setattr(_scratch, name, buffer)
    return buffer[:size]
