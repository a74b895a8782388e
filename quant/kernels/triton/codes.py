"""Knows how a weight's words and scales become numbers inside a kernel; knows no launches.

Legend: R rows of a tile, G groups of a tile, W words a group.
"""

import triton
import triton.language as tl


@triton.jit
def weight_at(
    address,  # int64: where the weight's words begin; a multiple of 16
    row,
    group,
    ROW_GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
):
    """Pointers to the words and to the scales of a weight, from (row, group) on."""
    start = row * ROW_GROUPS + group
    words = address.to(tl.pointer_type(tl.int32)) + start * GROUP_WORDS
    scales = (address + PACKED_NBYTES).to(tl.pointer_type(tl.bfloat16)) + start
    # Nothing is known of a pointer that was a number; said here, loads are 16 bytes wide.
    return tl.multiple_of(words, 16), scales


@triton.jit
def load_groups(
    words,
    scales,
    rows,  # [R], from the row that the pointers stand at
    num_rows,  # that there are from there on
    start,  # the first group, likewise
    num_groups,
    GROUPS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
):
    """int32 words [R, G * W] and fp32 scales [R, G]; zero scales where the weight has ended."""
    word_columns = start * GROUP_WORDS + tl.arange(0, GROUPS * GROUP_WORDS)
    groups = start + tl.arange(0, GROUPS)
    here = (rows < num_rows)[:, None]
    # Words are read once: they shall not push anything else out of the cache.
    word = tl.load(
        words + rows[:, None] * (ROW_GROUPS * GROUP_WORDS) + word_columns[None, :],
        here & (word_columns < num_groups * GROUP_WORDS)[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    scale = tl.load(
        scales + rows[:, None] * ROW_GROUPS + groups[None, :],
        here & (groups < num_groups)[None, :],
        other=0.0,
    )
    return word, scale.to(tl.float32)


@triton.jit
def signed_code(words, index: tl.constexpr, BITS: tl.constexpr):
    """Code `index` of every int32 word as the signed number that it stands for, fp32 and exact.

    The code stays where it is in its half of the word and replaces bits of 2^23, to which it is
    thereby added; a multiplication and a subtraction, neither of which rounds, take it from there
    to its place and take off 2^23 and the zero point. So a code costs two instructions: one masks
    and merges, one multiplies and subtracts.
    """
    shift: tl.constexpr = index * BITS % 16
    half = words >> (index * BITS // 16 * 16)
    raised = ((half & (((1 << BITS) - 1) << shift)) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised * (1.0 / (1 << shift)) - ((1 << (23 - shift)) + (1 << (BITS - 1)))


@triton.jit
def sum_groups(dot, GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr):
    """Sums over each group: fp32 [R, G] of [R, G * W]."""
    return tl.sum(tl.reshape(dot, (dot.shape[0], GROUPS, GROUP_WORDS)), 2)
