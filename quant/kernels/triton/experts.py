"""Knows the kernels that compute routed experts for few tokens, each choice reading its expert by
itself, where the address table says that it lies; knows nothing of how it came there.

Legend: T tokens, k choices a token, C = T * k, H hidden, I intermediate size, S the part of I that
counts; R rows, G groups of a tile, W words a group, N codes a word.

A thread holds whole 16-byte pieces of rows, and no value crosses warps before the last sums: so
nothing waits at barriers meanwhile, and all loads of a tile are under way at once. Vectors that are
multiplied with rows of K columns lie "by code", [N, K / N]: what meets code n of neighbouring words
lies side by side, and codes need not be interleaved.

Partial sums meet in one fixed order, so a result does not depend on timing.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.triton.card import OPTIONS, card_of
from quant.kernels.triton.choices import activated, add_choices, bias_at, biased, bytes_of
from quant.kernels.triton.codes import load_groups, signed_code, sum_groups, weight_at
from quant.kernels.triton.linear import planes_of
from quant.layout import ExpertLayout
from quant.scheme import WORD_BITS, QuantScheme

# ids int64 [T, k], weights [T, k], addresses int64 [E], biases fp32 [E, 2 I + H] (or anything where
# there are none): what both kernels know of choices and experts.
_Table = tuple[Tensor, Tensor, Tensor, Tensor]
_TILE_WORDS = 128  # of a row: 16 bytes for each of 32 threads
# Rows of a tile; of gate, as many of up come with them. With more, registers leave fewer warps on a
# processor. In the interpreter a program costs what its instructions do, however long a tile is.
_GATE_UP_ROWS, _DOWN_ROWS = (256, 256) if triton.knobs.runtime.interpret else (4, 8)


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
    biases: Tensor | None = None,  # fp32 [E, 2 I + H]
) -> None:
    """out += what the choices contribute whose experts are here; two or three launches, no sync."""
    if topk_ids.numel() == 0:
        return
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    x = planes_of(hidden, layout.scheme.bits, torch.float32)  # [T, N, H / N]
    table = (ids, weights, addresses, addresses if biases is None else biases)
    options = {"WEIGHT_ON_INPUT": weight_on_input, "BIASED": biased(biases, layout.hidden_size)}
    act = _activations(x, table, layout, span, options | {"ACTIVATION": activation})
    if ids.shape[1] == 1:
        _down(out, act, table, layout, span, options)
        return
    contributions = out.new_empty(ids.numel(), layout.hidden_size)  # [C, H]
    _down(contributions, act, table, layout, span, options)
    add_choices(out, contributions, ids, addresses)


def _activations(
    x: Tensor,  # fp32 [T, N, H / N]
    table: _Table,
    layout: ExpertLayout,
    span: tuple[int, int],
    options: Mapping[str, Any],
) -> Tensor:
    """What each choice's down is multiplied with, weighted: fp32 [C, N, S / N], undefined where
    the expert is not here."""
    begin, end = span
    ids = table[0]
    num_choices, num_codes = ids.numel(), x.shape[1]
    act = x.new_empty(num_choices, num_codes, (end - begin) // num_codes)
    num_rows = triton.cdiv(end - begin, _GATE_UP_ROWS)
    warps, groups = _division(layout.hidden_size, layout.scheme, num_choices * num_rows, x.device)
    # Choices vary fastest: what comes over the link flows while other choices read VRAM.
    _gate_up_kernel[num_choices, num_rows](
        act,
        x,
        *table,
        TOP_K=ids.shape[1],
        HIDDEN=layout.hidden_size,
        BEGIN=begin,
        SPAN=end - begin,
        **options,
        ROWS=_GATE_UP_ROWS,
        GROUPS=groups,
        **bytes_of(layout),
        num_warps=warps,
        **OPTIONS,
    )
    return act


def _down(
    target: Tensor,  # fp32 [C, H]
    act: Tensor,
    table: _Table,
    layout: ExpertLayout,
    span: tuple[int, int],
    options: Mapping[str, Any],
) -> None:
    """What each choice contributes: added to `target` where tokens have one, else written there.

    What stands for an expert that is not here stays as it is.
    """
    begin, end = span
    ids = table[0]
    num_choices, num_rows = ids.numel(), triton.cdiv(layout.hidden_size, _DOWN_ROWS)
    warps, groups = _division(end - begin, layout.scheme, num_choices * num_rows, act.device)
    _down_kernel[num_choices, num_rows](
        target,
        act,
        *table,
        ADD=ids.shape[1] == 1,
        HIDDEN=layout.hidden_size,
        INTERMEDIATE=layout.intermediate_size,
        BEGIN=begin,
        SPAN=end - begin,
        **options,
        ROWS=_DOWN_ROWS,
        GROUPS=groups,
        **bytes_of(layout),
        num_warps=warps,
        **OPTIONS,
    )


def _division(
    num_columns: int, scheme: QuantScheme, num_programs: int, device: torch.device
) -> tuple[int, int]:
    """Warps of each program and G, a power of two, for rows of `num_columns`."""
    num_groups = num_columns // scheme.group_size
    most = _TILE_WORDS * WORD_BITS // scheme.bits // scheme.group_size  # of one warp
    groups = min(most, triton.next_power_of_2(num_groups))
    warps = card_of(device).warps_a_row(num_programs, triton.cdiv(num_groups, groups))
    return warps, warps * groups


@triton.jit
def _gate_up_kernel(
    act,  # fp32 [C, N, S / N]
    x,  # fp32 [T, N, H / N]
    ids,  # int64 [C]
    weights,  # [C]
    addresses,  # int64 [E]
    biases,  # fp32 [E, 2 I + H]
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr,  # I of the biases; 0: there are none
    ACTIVATION: tl.constexpr,
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
    expert = tl.load(ids + choice)
    address = tl.load(addresses + expert)
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
        row = first + rows
        if WEIGHT_ON_INPUT:
            gate *= weight
            up *= weight
        if BIASED > 0:
            begun, inside = BEGIN + row, row < SPAN
            gate += bias_at(biases, expert, begun, inside, 0, HIDDEN, BIASED)
            up += bias_at(biases, expert, begun, inside, 1, HIDDEN, BIASED)
        value = activated(gate, up, ACTIVATION)
        if not WEIGHT_ON_INPUT:  # of the output, which is linear in this
            value *= weight
        place = row % CODES * (SPAN // CODES) + row // CODES
        tl.store(act + choice.to(tl.int64) * SPAN + place, value, row < SPAN)


@triton.jit
def _down_kernel(
    target,  # fp32 [C, H]
    act,  # fp32 [C, N, S / N]
    ids,  # int64 [C]
    weights,  # [C]
    addresses,  # int64 [E]
    biases,  # fp32 [E, 2 I + H]
    ADD: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BEGIN: tl.constexpr,
    SPAN: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BIASED: tl.constexpr,  # I of the biases; 0: there are none
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PACKED_NBYTES: tl.constexpr,
    PROJECTION_NBYTES: tl.constexpr,
):
    """Program (c, r): R rows of down of choice c, over the span."""
    CODES: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = GROUP_SIZE // CODES
    ROW_GROUPS: tl.constexpr = INTERMEDIATE // GROUP_SIZE
    choice = tl.program_id(0)
    expert = tl.load(ids + choice)
    address = tl.load(addresses + expert)
    if address != 0:
        first = tl.program_id(1) * ROWS
        rows = tl.arange(0, ROWS)
        words, scales = weight_at(
            address + 2 * PROJECTION_NBYTES,
            first,
            BEGIN // GROUP_SIZE,
            ROW_GROUPS,
            GROUP_WORDS,
            PACKED_NBYTES,
        )
        NUM_GROUPS: tl.constexpr = SPAN // GROUP_SIZE
        act += choice.to(tl.int64) * SPAN
        sums = tl.zeros((ROWS, GROUPS), tl.float32)
        for start in range(0, NUM_GROUPS, GROUPS):
            word, scale = load_groups(
                *(words, scales, rows, HIDDEN - first, start, NUM_GROUPS),
                *(GROUPS, ROW_GROUPS, GROUP_WORDS),
            )
            columns = start * GROUP_WORDS + tl.arange(0, GROUPS * GROUP_WORDS)
            dot = tl.zeros((ROWS, GROUPS * GROUP_WORDS), tl.float32)
            for code in tl.static_range(CODES):
                part = tl.load(
                    act + code * (SPAN // CODES) + columns,
                    columns < NUM_GROUPS * GROUP_WORDS,
                    other=0.0,
                )
                dot += signed_code(word, code, BITS) * part[None, :]
            sums += sum_groups(dot, GROUPS, GROUP_WORDS) * scale
        total = tl.sum(sums, 1)
        inside = first + rows < HIDDEN
        if BIASED > 0 and BEGIN == 0:  # so that spans add up
            bias = bias_at(biases, expert, first + rows, inside, 2, HIDDEN, BIASED)
            if not WEIGHT_ON_INPUT:
                bias *= tl.load(weights + choice).to(tl.float32)
            total += bias
        target += choice.to(tl.int64) * HIDDEN + first
        if ADD:
            total += tl.load(target + rows, inside, other=0.0)
        tl.store(target + rows, total, inside)
