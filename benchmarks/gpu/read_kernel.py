"""Knows how a kernel reads a run of bytes once, wherever it lies; what it reads it adds up."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # words a program reads at once
NUM_WARPS = 4


def read(address: Tensor, nbytes: int, sums: Tensor) -> None:
    """sums int64 [programs] += the int32 words at `address`, int64 [1], all programs together.

    Address and size are multiples of 16.
    """
    assert nbytes % 16 == 0, f"{nbytes} bytes are not read in whole pieces"
    words = nbytes // 4
    _read[(sums.numel(),)](address, words, sums, BLOCK=_BLOCK, num_warps=NUM_WARPS)


@triton.jit
def _read(address, words, sums, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    words = tl.multiple_of(words, 4)
    source = tl.load(address).to(tl.pointer_type(tl.int32))
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    while start < words:
        at = start + tl.arange(0, BLOCK)
        # An address from memory says nothing of itself: without the hint loads are of 4 bytes.
        pointers = tl.max_contiguous(tl.multiple_of(source + at, 16), BLOCK)
        values = tl.load(pointers, mask=at < words, other=0, eviction_policy="evict_first")
        total += values.to(tl.int64)
        start += stride
    tl.atomic_add(sums + tl.program_id(0), tl.sum(total, axis=0))
