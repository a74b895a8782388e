"""Knows kernels that treat rows one by one: norms, the MLP's activation, routing, the embedding's
lookup.

Every launcher here takes the arguments of its op in moecli.models.fused. Rounding follows the
references: where those hold a value in the compute dtype, so do the kernels.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # numbers a program of the plain elementwise kernels


@triton.jit
def _rms_norm_kernel(
    x,  # [rows, size]; with ADD it becomes x + delta
    delta,
    weight,  # [weight_rows, size]: row r takes row r % weight_rows
    out,
    size,
    weight_rows,
    eps,
    ADD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    at = row.to(tl.int64) * size + columns
    values = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        added = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(x + at, values, mask=mask)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(x.dtype.element_ty)
    if WEIGHTED:
        factors = tl.load(weight + (row % weight_rows) * size + columns, mask=mask, other=0.0)
        normed = normed.to(tl.float32) * factors.to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(gate.dtype.element_ty)
    product = activated.to(tl.float32) * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _choose_experts_kernel(
    logits,  # [T, E]
    ids,  # int64 [T, TOP_K]
    weights,  # [T, TOP_K]
    num_experts,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One token: the largest number is taken and struck out, as often as experts are wanted."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    place = tl.arange(0, CHOICES)
    here = expert < num_experts
    scores = tl.load(logits + token * num_experts + expert, here, other=-float("inf"))
    scores = scores.to(tl.float32)
    left = tl.where(here, scores, -float("inf"))
    chosen = tl.zeros([CHOICES], tl.int32)
    found = tl.zeros([CHOICES], tl.float32)
    for turn in tl.static_range(TOP_K):
        largest = tl.max(left, axis=0)
        # Where logits are no numbers, any expert will do, but it must be one.
        which = tl.minimum(tl.argmax(left, axis=0), num_experts - 1)
        chosen = tl.where(place == turn, which, chosen)
        found = tl.where(place == turn, largest, found)
        left = tl.where(expert == which, -float("inf"), left)
    if KIND == "sigmoid":
        found = 1.0 / (1.0 + tl.exp(-found))
    else:
        top = tl.max(scores, axis=0)
        found = tl.exp(found - top)
    if KIND == "softmax":
        found = found / tl.sum(tl.exp(scores - top), axis=0)
    if NORMALIZE or KIND == "softmax_of_chosen":
        found = found / tl.sum(tl.where(place < TOP_K, found, 0.0), axis=0)
    at = token * TOP_K + place
    tl.store(ids + at, chosen.to(tl.int64), place < TOP_K)
    tl.store(weights + at, found.to(weights.dtype.element_ty), place < TOP_K)


@triton.jit
def _gather_rows_kernel(address, ids, out, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    table = tl.load(address).to(out.dtype)
    row = tl.load(ids + token)
    tl.store(out + token * size + columns, tl.load(table + row * size + columns, mask=mask), mask)


INTERPRETED = not isinstance(_rms_norm_kernel, triton.JITFunction)  # TRITON_INTERPRET=1


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _norm(x.contiguous(), None, weight, eps)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    assert residual.is_contiguous(), "a residual stream with gaps"
    assert residual.shape == delta.shape, f"{delta.shape} added to {residual.shape}"
    return _norm(residual, delta.contiguous(), weight, eps)


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    out, size = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // size
    if rows == 0:
        return out
    weight_rows = 1 if weight is None else weight.numel() // size
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        x,
        x if delta is None else delta,
        x if weight is None else weight.contiguous(),
        out,
        size,
        weight_rows,
        eps,
        ADD=delta is not None,
        WEIGHTED=weight is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    if count:
        grid = (triton.cdiv(count, _BLOCK),)
        _silu_mul_kernel[grid](gate, up, out, count, BLOCK=_BLOCK)
    return out


def choose_experts(logits: Tensor, top_k: int, kind: str, normalize: bool) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, top_k)
    if num_tokens:
        _choose_experts_kernel[(num_tokens,)](
            *(logits.contiguous(), ids, weights, num_experts),
            KIND=kind,
            NORMALIZE=normalize,
            TOP_K=top_k,
            CHOICES=triton.next_power_of_2(top_k),
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=1,
        )
    return ids, weights


def gather_rows(address: Tensor, ids: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(ids.shape[0], hidden_size, dtype=dtype, device=ids.device)
    if ids.shape[0]:
        block = min(_BLOCK, triton.next_power_of_2(hidden_size))
        grid = (ids.shape[0], triton.cdiv(hidden_size, block))
        _gather_rows_kernel[grid](address, ids.contiguous(), out, hidden_size, BLOCK=block)
    return out
