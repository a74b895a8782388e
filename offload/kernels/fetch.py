"""Knows how many programs copy experts into their slots together; not why these experts.

The grid never changes, so that a captured graph holds it: how many experts there are to copy is
read on the device, and a program without work ends at once. Of the expert after these a few
pieces are copied.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from offload.device_ops import PIECE_NBYTES

BLOCK = 4096  # words of 4 bytes: four 16-byte loads on their way for each of 256 threads
MAX_PROGRAMS = 64  # 1 MiB on its way in all, far above what a link holds, on any card
NUM_WARPS = 8


@triton.jit
def _words(address, offset, BLOCK: tl.constexpr):
    """Pointers to BLOCK words in a row. An address read from memory says nothing about itself:
    only the hint on the block of pointers gives loads and stores of 16 bytes."""
    words = address.to(tl.pointer_type(tl.int32)) + offset
    return tl.max_contiguous(tl.multiple_of(words, 16), BLOCK)


@triton.jit
def fetch_kernel(src, dst, count, num_pieces, BLOCK: tl.constexpr):
    num_whole, rest = tl.load(count), tl.load(count + 1)
    blocks = tl.cdiv(num_pieces * 4, BLOCK)  # of one expert
    end = num_whole * blocks + tl.cdiv(rest * 4, BLOCK)
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    while block < end:
        item = block // blocks
        offset = (block % blocks) * BLOCK + lane
        # Said so that the compiler sees it: masks do not split a piece.
        here = offset < tl.where(item < num_whole, num_pieces, rest) * 4
        source = _words(tl.load(src + item), offset, BLOCK)
        target = _words(tl.load(dst + item), offset, BLOCK)
        # Read once and never again from there, so it should not push anything out of the cache.
        word = tl.load(source, mask=here, eviction_policy="evict_first")
        tl.store(target, word, mask=here)
        block += tl.num_programs(0)


def fetch(src: Tensor, dst: Tensor, count: Tensor, nbytes: int, slots: Tensor) -> None:
    """One launch of a fixed grid; see `device_ops.fetch`."""
    assert nbytes % PIECE_NBYTES == 0, f"{nbytes} bytes are not whole pieces"
    programs = min(MAX_PROGRAMS, src.numel() * triton.cdiv(nbytes, BLOCK * 4))
    num_pieces = nbytes // PIECE_NBYTES
    fetch_kernel[(programs,)](src, dst, count, num_pieces, BLOCK=BLOCK, num_warps=NUM_WARPS)
