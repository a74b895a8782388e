"""Knows how a quantized weight multiplies few tokens and many, in Triton; knows no experts.

Legend: T tokens, O out, I in features; C codes a word, W = I / C words a row, S splits of a row.

Code j of word w belongs to column w * C + j. Nothing is interleaved: x is split into C planes, of
which plane j holds the columns j, j + C, j + 2C, ..., and code j of every word meets plane j.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.triton.card import OPTIONS, card_of
from quant.kernels.triton.codes import load_groups, signed_code
from quant.scheme import WORD_BITS, QuantScheme
from quant.tensor import QuantizedWeight

FEW_TOKENS = 8  # up to here every weight byte is read once, by a kernel without matrix units
_FEW_WORDS = 128  # of a row at a time: a warp reads them in pieces of 16 bytes a thread
_FEW_ROWS = {1: 4, 2: 4, 4: 4, 8: 2}  # rows a program, by tokens: as many as registers hold
BLOCK_COLUMNS = 128  # columns of a weight that a tile of the many-token kernels expands at a time
BLOCK_ROWS = 64
_MANY_A_MULTIPROCESSOR = 2  # programs of the many-token kernel; rows are split until it has them
# Tiles that follow each other are of the same tokens; as many rows as this stay in the L2 cache
# while the next tokens take their turn.
BAND = 8
_SUM_COLUMNS = 512


def linear_quantized(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x fp32, bf16 or fp16 [T, I] -> [T, O] in x's dtype, summed in fp32.

    Up to FEW_TOKENS the weight is not rounded; from there on it is rounded to x's dtype.
    """
    num_tokens, out_features = x.shape[0], weight.out_features
    out = x.new_empty(num_tokens, out_features)
    if num_tokens == 0:
        return out
    assert weight.packed.is_contiguous(), "words of a weight lie row after row"
    assert weight.scale.is_contiguous(), "scales of a weight lie row after row"
    if num_tokens <= FEW_TOKENS:
        _few_tokens(out, x, weight)
    else:
        _many_tokens(out, x, weight)
    return out


def planes_of(x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """x [T, I] -> [T, C, W], contiguous: [t, j, w] is x[t, w * C + j]."""
    codes = WORD_BITS // bits
    words = x.shape[1] // codes
    planes = x.new_empty(x.shape[0], codes, words, dtype=dtype)
    return planes.copy_(x.unflatten(1, (words, codes)).transpose(1, 2))


def _few_tokens(out: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    num_tokens, block_tokens = x.shape[0], triton.next_power_of_2(x.shape[0])
    block_rows, bits = _FEW_ROWS[block_tokens], weight.scheme.bits
    num_words, words_of_group = weight.packed.shape[1], group_words(weight.scheme)
    blocks = triton.cdiv(weight.out_features, block_rows)
    warps = card_of(x.device).warps_a_row(blocks, triton.cdiv(num_words, _FEW_WORDS))
    _few_kernel[(blocks,)](
        planes_of(x, bits, torch.float32),
        weight.packed,
        weight.scale,
        out,
        num_tokens,
        weight.out_features,
        BITS=bits,
        ROW_GROUPS=weight.scale.shape[1],
        GROUP_WORDS=words_of_group,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_GROUPS=warps * _FEW_WORDS // words_of_group,
        num_warps=warps,
        **OPTIONS,
    )


def _many_tokens(out: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    num_tokens, bits = x.shape[0], weight.scheme.bits
    num_words, block_words = weight.packed.shape[1], BLOCK_COLUMNS * bits // WORD_BITS
    block_tokens = token_block(num_tokens, x)
    token_blocks = triton.cdiv(num_tokens, block_tokens)
    row_blocks = banded(weight.out_features)
    programs = _MANY_A_MULTIPROCESSOR * card_of(x.device).multiprocessors
    wanted = triton.cdiv(programs, token_blocks * row_blocks)
    split_words, num_splits = split(num_words, block_words, wanted)
    target = _partials(out, num_splits)
    _many_kernel[(token_blocks * row_blocks, num_splits)](
        planes_of(x, bits, x.dtype),
        weight.packed,
        weight.scale,
        target,
        num_tokens,
        weight.out_features,
        num_words,
        split_words,
        token_blocks,
        BITS=bits,
        GROUP_WORDS=group_words(weight.scheme),
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_WORDS=block_words,
        BAND=BAND,
        WIDEN=widen(x.dtype),
        **OPTIONS,
    )
    _sum_splits(out, target)


def widen(dtype: torch.dtype) -> bool:
    """Triton's interpreter takes the bits of bf16 factors for integers; as fp32 they have the same
    products."""
    return dtype == torch.bfloat16 and not isinstance(dot, triton.JITFunction)


def group_words(scheme: QuantScheme) -> int:
    return scheme.group_size * scheme.bits // WORD_BITS


def token_block(num_tokens: int, x: Tensor) -> int:
    """Tokens of a tile, of x's kind: a power of two that matrix units take, and that fits."""
    wide = x.dtype != torch.float32 and card_of(x.device).has_wide_tiles
    most = 64 if wide else 32
    return min(max(triton.next_power_of_2(num_tokens), 16), most)


def banded(num_rows: int) -> int:
    """Blocks of rows, rounded up to whole bands."""
    return triton.cdiv(num_rows, BLOCK_ROWS * BAND) * BAND


def split(num_words: int, block_words: int, wanted: int) -> tuple[int, int]:
    """How many words of a row a program takes, and how many programs share a row."""
    blocks = triton.cdiv(num_words, block_words)
    split_words = triton.cdiv(blocks, min(wanted, blocks)) * block_words
    return split_words, triton.cdiv(num_words, split_words)


def _partials(out: Tensor, num_splits: int) -> Tensor:
    """Where the splits of a row go: [S, T, O]; a single one goes straight into `out`."""
    if num_splits == 1:
        return out.unsqueeze(0)
    return out.new_empty(num_splits, *out.shape, dtype=torch.float32)


def _sum_splits(out: Tensor, partials: Tensor) -> None:
    num_splits, size = partials.shape[0], out.numel()
    if num_splits > 1:
        _sum_kernel[(triton.cdiv(size, _SUM_COLUMNS),)](
            partials, out, size, num_splits, BLOCK=_SUM_COLUMNS, **OPTIONS
        )


@triton.jit
def tile_at(index, token_blocks, BAND: tl.constexpr):
    """Which block of rows and which of tokens the program `index` has: bands of rows, in a band
    the tokens, for each of them the rows of the band."""
    band = index // (BAND * token_blocks)
    return band * BAND + index % BAND, index // BAND % token_blocks


@triton.jit
def load_weight(
    words,  # pointers to the first word of each row, [rows]
    scales,  # pointers to the first scale of each row, [rows]
    has_row,
    start,
    end,
    BLOCK_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
):
    """Words from `start` on, packed, and the fp32 scale of each: [rows, words]; zeros outside."""
    ROWS: tl.constexpr = has_row.shape[0]
    GROUPS: tl.constexpr = BLOCK_WORDS // GROUP_WORDS
    word = start + tl.arange(0, BLOCK_WORDS)
    group = start // GROUP_WORDS + tl.arange(0, GROUPS)
    packed = tl.load(
        words[:, None] + word[None, :], has_row[:, None] & (word < end)[None, :], other=0
    )
    scale = tl.load(
        scales[:, None] + group[None, :],
        has_row[:, None] & (group * GROUP_WORDS < end)[None, :],
        other=0.0,
    ).to(tl.float32)  # [rows, groups]
    # Spread here, not by loading a scale for every word: so the compiler is free to expand the
    # codes in the registers of the threads that multiply them.
    spread = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, GROUP_WORDS))
    return packed, tl.reshape(spread, (ROWS, BLOCK_WORDS))


@triton.jit
def load_plane(planes, has_token, start, end, BLOCK_WORDS: tl.constexpr):
    """What a code of each word from `start` on is multiplied with, [words, tokens]; zeros outside.

    `planes` are pointers to the first word of each token's plane.
    """
    word = start + tl.arange(0, BLOCK_WORDS)
    inside = (word < end)[:, None] & has_token[None, :]
    return tl.load(planes[None, :] + word[:, None], inside, other=0.0)


@triton.jit
def dot(tile, x, total, WIDEN: tl.constexpr):
    """total + tile @ x in fp32, the tile [rows, words] rounded to the dtype of x [words, tokens]"""
    tile = tile.to(x.dtype)
    if WIDEN:
        tile = tile.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(tile, x, total, input_precision="ieee")


@triton.jit
def product(
    planes,  # pointers to the first word of each token's first plane, [tokens]
    has_token,
    words,  # pointers to the first word of each row, [rows]
    scales,  # pointers to the first scale of each row, [rows]
    has_row,
    begin,
    end,
    plane_words,  # words of a plane
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Words begin..end-1 of the rows times those of the tokens: fp32 [rows, tokens]."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for start in range(begin, end, BLOCK_WORDS):
        packed, scale = load_weight(words, scales, has_row, start, end, BLOCK_WORDS, GROUP_WORDS)
        for index in tl.static_range(32 // BITS):
            x = load_plane(planes + index * plane_words, has_token, start, end, BLOCK_WORDS)
            total = dot(signed_code(packed, index, BITS) * scale, x, total, WIDEN)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _few_kernel(
    planes,  # fp32 [T, C, W]
    packed,  # int32 [O, W]
    scale,  # bf16 [O, ROW_GROUPS]
    out,  # [T, O]
    num_tokens,
    num_rows,
    BITS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """A warp holds a piece of each row, 16 bytes a thread, and multiplies it with every token.

    Only their last sums meet, in shared memory.
    """
    CODES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = ROW_GROUPS * GROUP_WORDS
    rows = tl.arange(0, BLOCK_ROWS)
    words = tl.arange(0, BLOCK_GROUPS * GROUP_WORDS)[None, None, :]
    token = tl.arange(0, BLOCK_TOKENS)[:, None, None]
    first = tl.program_id(0) * BLOCK_ROWS
    row_words = packed + first.to(tl.int64) * WORDS
    row_scales = scale + first.to(tl.int64) * ROW_GROUPS
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS, BLOCK_GROUPS), tl.float32)
    for start in range(0, ROW_GROUPS, BLOCK_GROUPS):
        word, scales = load_groups(
            *(row_words, row_scales, rows, num_rows - first, start, ROW_GROUPS),
            *(BLOCK_GROUPS, ROW_GROUPS, GROUP_WORDS),
        )
        column = start * GROUP_WORDS + words
        inside = (token < num_tokens) & (column < WORDS)
        dots = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS, BLOCK_GROUPS * GROUP_WORDS), tl.float32)
        for index in tl.static_range(CODES):
            x = tl.load(planes + (token * CODES + index) * WORDS + column, inside, 0.0)
            dots += x * signed_code(word, index, BITS)[None, :, :]
        dots = tl.reshape(dots, (BLOCK_TOKENS, BLOCK_ROWS, BLOCK_GROUPS, GROUP_WORDS))
        total += tl.sum(dots, 3) * scales[None, :, :]
    result = tl.sum(total, 2)  # [tokens, rows]
    token = tl.arange(0, BLOCK_TOKENS)[:, None]
    row = first + rows[None, :]
    tl.store(
        out + token.to(tl.int64) * num_rows + row,
        result.to(out.dtype.element_ty),
        (token < num_tokens) & (row < num_rows),
    )


@triton.jit(do_not_specialize=["num_tokens", "token_blocks"])
def _many_kernel(
    planes,  # [T, C, W] in the dtype that is multiplied in
    packed,  # int32 [O, W]
    scale,  # bf16 [O, W / GROUP_WORDS]
    target,  # [S, T, O]
    num_tokens,
    num_rows,
    num_words,
    split_words,
    token_blocks,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BAND: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row_block, token_block = tile_at(tl.program_id(0), token_blocks, BAND)
    if row_block * BLOCK_ROWS < num_rows:
        row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        begin = tl.program_id(1) * split_words
        total = product(
            planes + token.to(tl.int64) * (num_words * (32 // BITS)),
            token < num_tokens,
            packed + row.to(tl.int64) * num_words,
            scale + row.to(tl.int64) * (num_words // GROUP_WORDS),
            row < num_rows,
            begin,
            tl.minimum(begin + split_words, num_words),
            num_words,
            BITS,
            GROUP_WORDS,
            BLOCK_TOKENS,
            BLOCK_ROWS,
            BLOCK_WORDS,
            WIDEN,
        )  # [rows, tokens]
        place = tl.program_id(1) * num_tokens + token
        tl.store(
            target + place.to(tl.int64)[None, :] * num_rows + row[:, None],
            total.to(target.dtype.element_ty),
            (token < num_tokens)[None, :] & (row < num_rows)[:, None],
        )


@triton.jit(do_not_specialize=["size", "num_splits"])
def _sum_kernel(partials, out, size, num_splits, BLOCK: tl.constexpr):
    """out [size] = the sum of partials [S, size], in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_splits):
        total += tl.load(partials + part * size + index, index < size, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), index < size)
