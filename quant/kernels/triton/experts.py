"""Knows the kernels that compute routed experts for few tokens, each choice reading its expert by
itself, where the address table says that it lies; knows nothing of how it came there.

Legend: T tokens, k choices a token, C = T * k, H hidden, I intermediate size, S the part of I that
counts, P splits; R rows, G groups of a tile, W words a group, N codes a word.

A program is one warp, and a thread holds whole 16-byte pieces of rows: no value crosses warps, so
nothing waits at barriers, and all loads of a tile are under way at once. Vectors that are
multiplied with rows of K columns lie "by code", [N, K / N]: what meets code n of neighbouring words
lies side by side, and codes need not be interleaved.

Partial sums meet in one fixed order, so a result does not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.triton.codes import load_groups, signed_code, sum_groups, weight_at
from quant.layout import ExpertLayout
from quant.scheme import WORD_BITS, QuantScheme

_TILE_WORDS = 128  # of a row: 16 bytes for each of 32 threads
# Rows of a tile; of gate, as many of up come with them. With more, registers leave fewer warps on a
# processor. In the interpreter a program costs what its instructions do, however long a tile is.
_GATE_UP_ROWS, _DOWN_ROWS = (256, 256) if triton.knobs.runtime.interpret else (4, 8)
_PROGRAMS = 4096  # of the down projection: about as many warps as the largest cards hold at once
_SUM_COLUMNS = 256
# Products and sums are to be one instruction; from version 3.10 on, Triton must be told.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def add_routed_experts(
    out: Tensor,  # fp32 [T, H], contiguous
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E]: multiples of 16; 0: not here
    layout: ExpertLayout,
    *,
    activation: str,
    weight_on_input: bool,
    span: tuple[int, int],
) -> None:
    """out += what the choices contribute whose experts are here; three launches, no sync."""
    assert activation == "silu", f"no kernel knows the activation {activation}"
    num_tokens, top_k = topk_ids.shape
    if topk_ids.numel() == 0:
        return
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    x = _by_code(hidden, layout.scheme)  # [T, N, H / N]
    act = _activations(x, ids, weights, addresses, layout, weight_on_input, span)  # [C, N, S / N]
    partials = _down_partials(act, ids, addresses, layout, span)  # [P, C, H]
    grid = (num_tokens, triton.cdiv(layout.hidden_size, _SUM_COLUMNS))
    _sum_kernel[grid](
        out,
        partials,
        ids,
        addresses,
        TOP_K=top_k,
        NUM_CHOICES=ids.numel(),
        NUM_SPLITS=partials.shape[0],
        HIDDEN=layout.hidden_size,
        COLUMNS=_SUM_COLUMNS,
        **_OPTIONS,
    )


def _activations(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    addresses: Tensor,
    layout: ExpertLayout,
    weight_on_input: bool,
    span: tuple[int, int],
) -> Tensor:
    """silu(gate) * up of each choice, weighted: fp32 [C, N, S / N], undefined where not here."""
    begin, end = span
    num_choices, num_codes = ids.numel(), x.shape[1]
    act = x.new_empty(num_choices, num_codes, (end - begin) // num_codes)
    # Choices vary fastest: what comes over the link flows while other choices read VRAM.
    _gate_up_kernel[num_choices, triton.cdiv(end - begin, _GATE_UP_ROWS)](
        act,
        x,
        ids,
        weights,
        addresses,
        TOP_K=ids.shape[1],
        HIDDEN=layout.hidden_size,
        BEGIN=begin,
        SPAN=end - begin,
        WEIGHT_ON_INPUT=weight_on_input,
        ROWS=_GATE_UP_ROWS,
        GROUPS=_tile_groups(layout.hidden_size, layout.scheme),
        **_bytes_of(layout),
        **_OPTIONS,
    )
    return act


def _down_partials(
    act: Tensor, ids: Tensor, addresses: Tensor, layout: ExpertLayout, span: tuple[int, int]
) -> Tensor:
    """Sums over parts of the span: fp32 [P, C, H], undefined where the expert is not here."""
    begin, end = span
    num_choices, num_rows = ids.numel(), triton.cdiv(layout.hidden_size, _DOWN_ROWS)
    tile_groups = _tile_groups(end - begin, layout.scheme)
    num_tiles = triton.cdiv((end - begin) // layout.scheme.group_size, tile_groups)
    split_tiles = triton.cdiv(num_tiles, max(1, _PROGRAMS // (num_choices * num_rows)))
    num_splits = triton.cdiv(num_tiles, split_tiles)
    partials = act.new_empty(num_splits, num_choices, layout.hidden_size)
    _down_kernel[num_choices, num_rows, num_splits](
        partials,
        act,
        ids,
        addresses,
        HIDDEN=layout.hidden_size,
        INTERMEDIATE=layout.intermediate_size,
        BEGIN=begin,
        SPAN=end - begin,
        ROWS=_DOWN_ROWS,
        GROUPS=tile_groups,
        SPLIT_GROUPS=split_tiles * tile_groups,
        **_bytes_of(layout),
        **_OPTIONS,
    )
    return partials


def _by_code(hidden: Tensor, scheme: QuantScheme) -> Tensor:
    """fp32 [T, N, H / N] of hidden [T, H], in one pass."""
    num_codes = WORD_BITS // scheme.bits
    num_tokens, hidden_size = hidden.shape
    shape = (num_tokens, num_codes, hidden_size // num_codes)
    x = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    return x.copy_(hidden.unflatten(1, (-1, num_codes)).transpose(1, 2))


def _tile_groups(num_columns: int, scheme: QuantScheme) -> int:
    """G for rows of `num_columns`: a power of two."""
    most = _TILE_WORDS * WORD_BITS // scheme.bits // scheme.group_size
    return min(most, triton.next_power_of_2(num_columns // scheme.group_size))


def _bytes_of(layout: ExpertLayout) -> dict[str, int]:
    """What the kernels must know of an expert's bytes: its projections are of one size."""
    starts = [part.offset for part in layout.parts[::2]]
    nbytes = layout.nbytes // 3
    assert starts == [0, nbytes, 2 * nbytes], "gate, up and down must follow each other evenly"
    return {
        "BITS": layout.scheme.bits,
        "GROUP_SIZE": layout.scheme.group_size,
        "PACKED_NBYTES": layout.parts[0].nbytes,
        "PROJECTION_NBYTES": nbytes,
    }


@triton.jit
def _gate_up_kernel(
    act,  # fp32 [C, N, S / N]
    x,  # fp32 [T, N, H / N]
    ids,  # int64 [C]
    weights,  # [C]
    addresses,  # int64 [E]
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
    PROJECTION_NBYTES: tl.constexpr,
):
    """Program (c, r): R rows of gate and of up of choice c, and their activation."""
    CODES: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // CODES
    ROW_GROUPS: tl.constexpr = HIDDEN // GROUP_SIZE
    choice = tl.program_id(0)
    address = tl.load(addresses + tl.load(ids + choice))
    if address != 0:
        first = tl.program_id(1) * ROWS
        rows = tl.arange(0, ROWS)
        gate_words, gate_scales = weight_at(
            address, BEGIN + first, 0, ROW_GROUPS, GROUP_WORDS, PACKED_NBYTES
        )
        up_words, up_scales = weight_at(
            address + PROJECTION_NBYTES, BEGIN + first, 0, ROW_GROUPS, GROUP_WORDS, PACKED_NBYTES
        )
        x += (choice // TOP_K).to(tl.int64) * HIDDEN
        gates = tl.zeros((ROWS, GROUPS), tl.float32)
        ups = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in range(0, ROW_GROUPS, GROUPS):
            gate_word, gate_scale = load_groups(
                *(gate_words, gate_scales, rows, SPAN - first, start, ROW_GROUPS),
                *(GROUPS, ROW_GROUPS, GROUP_WORDS),
            )
            up_word, up_scale = load_groups(
                *(up_words, up_scales, rows, SPAN - first, start, ROW_GROUPS),
                *(GROUPS, ROW_GROUPS, GROUP_WORDS),
            )
            columns = start * GROUP_WORDS + tl.arange(0, GROUPS * GROUP_WORDS)
            gate_dot = tl.zeros((ROWS, GROUPS * GROUP_WORDS), tl.float32)
            up_dot = tl.zeros((ROWS, GROUPS * GROUP_WORDS), tl.float32)
            for code in tl.static_range(CODES):
                part = tl.load(
                    x + code * (HIDDEN // CODES) + columns,
                    columns < ROW_GROUPS * GROUP_WORDS,
                    other=0.0,
                )[None, :]
                gate_dot += signed_code(gate_word, code, BITS) * part
                up_dot += signed_code(up_word, code, BITS) * part
            gates += sum_groups(gate_dot, GROUPS, GROUP_WORDS) * gate_scale
            ups += sum_groups(up_dot, GROUPS, GROUP_WORDS) * up_scale
        gate = tl.sum(gates, 1)  # [R]
        up = tl.sum(ups, 1)
        weight = tl.load(weights + choice).to(tl.float32)
        if WEIGHT_ON_INPUT:
            gate *= weight
            up *= weight
        else:  # of the output, which is linear in this
            up *= weight
        row = first + rows
        place = row % CODES * (SPAN // CODES) + row // CODES
        value = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(act + choice.to(tl.int64) * SPAN + place, value, row < SPAN)


@triton.jit
def _down_kernel(
    partials,  # fp32 [P, C, H]
    act,  # fp32 [C, N, S / N]
    ids,  # int64 [C]
    addresses,  # int64 [E]
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT_GROUPS: tl.constexpr,  # a multiple of GROUPS
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
    PROJECTION_NBYTES: tl.constexpr,
):
    """Program (c, r, p): R rows of down of choice c, over part p of the span."""
    CODES: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // CODES
    ROW_GROUPS: tl.constexpr = INTERMEDIATE // GROUP_SIZE
    choice = tl.program_id(0)
    address = tl.load(addresses + tl.load(ids + choice))
    if address != 0:
        first = tl.program_id(1) * ROWS
        first_group = tl.program_id(2) * SPLIT_GROUPS  # from the beginning of the span
        rows = tl.arange(0, ROWS)
        words, scales = weight_at(
            address + 2 * PROJECTION_NBYTES,
            first,
            BEGIN // GROUP_SIZE + first_group,
            ROW_GROUPS,
            GROUP_WORDS,
            PACKED_NBYTES,
        )
        num_groups = SPAN // GROUP_SIZE - first_group
        act += choice.to(tl.int64) * SPAN + first_group * GROUP_WORDS
        sums = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in range(0, SPLIT_GROUPS, GROUPS):
            word, scale = load_groups(
                *(words, scales, rows, HIDDEN - first, start, num_groups),
                *(GROUPS, ROW_GROUPS, GROUP_WORDS),
            )
            columns = start * GROUP_WORDS + tl.arange(0, GROUPS * GROUP_WORDS)
            dot = tl.zeros((ROWS, GROUPS * GROUP_WORDS), tl.float32)
            for code in tl.static_range(CODES):
                part = tl.load(
                    act + code * (SPAN // CODES) + columns,
                    columns < num_groups * GROUP_WORDS,
                    other=0.0,
                )
                dot += signed_code(word, code, BITS) * part[None, :]
            sums += sum_groups(dot, GROUPS, GROUP_WORDS) * scale
        split_start = tl.program_id(2) * tl.num_programs(0) + choice
        place = split_start.to(tl.int64) * HIDDEN + first + rows
        tl.store(partials + place, tl.sum(sums, 1), first + rows < HIDDEN)


@triton.jit
def _sum_kernel(
    out,  # fp32 [T, H]
    partials,  # fp32 [P, C, H]
    ids,  # int64 [C]
    addresses,  # int64 [E]
    TOP_K: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (t, b): a block of out[t] += the sums of its choices, splits first, in order."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(TOP_K):
        choice = token * TOP_K + k
        if tl.load(addresses + tl.load(ids + choice)) != 0:
            for split in range(NUM_SPLITS):
                place = (split * NUM_CHOICES + choice) * HIDDEN + columns
                total += tl.load(partials + place, inside, other=0.0)
    place = token * HIDDEN + columns
    tl.store(out + place, tl.load(out + place, inside, other=0.0) + total, inside)
