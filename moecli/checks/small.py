"""Knows the cases of what lies between matrix products: norms, heads, attention, embeddings.

What is compared with are the same operations by plain PyTorch, on the processor.

Legend: H hidden, D head size, N query heads, K key heads, C slots of a layer's cache, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moecli.checks.compare import HALF, agree, equal, kernels_chosen, random
from moecli.checks.lanes import pinned_slots
from moecli.models import fused
from moecli.selfcheck import Case

_EPS = 1e-5
_FINE, _COARSE = 1e-5, 2e-2  # in fp32, in 16 bits
_N, _K, _D, _C = 4, 2, 64, 96


def _precision(dtype: torch.dtype) -> float:
    return _FINE if dtype == torch.float32 else _COARSE


def norms(device: torch.device) -> None:
    """Rows of a length that is no power of two; the sum that is left behind, too."""
    for dtype in (torch.float32, torch.bfloat16):
        x, delta = (random(3, 200, seed=seed).to(dtype) for seed in (1, 2))
        weight = (1 + 0.3 * random(200, seed=3)).to(dtype)
        expected, left = fused.rms_norm(x, weight, _EPS), x.clone()
        expected_sum = fused.add_rms_norm(left, delta, weight, _EPS)
        expected_product = fused.silu_mul(x, delta)
        residual = x.clone().to(device)
        with kernels_chosen(device):
            found = fused.rms_norm(x.to(device), weight.to(device), _EPS)
            found_sum = fused.add_rms_norm(residual, delta.to(device), weight.to(device), _EPS)
            found_product = fused.silu_mul(x.to(device), delta.to(device))
        agree(f"norm in {dtype}", found, expected, _precision(dtype))
        agree(f"norm of a sum in {dtype}", found_sum, expected_sum, _precision(dtype))
        agree(f"the sum in {dtype}", residual, left, _precision(dtype))
        agree(f"silu times up in {dtype}", found_product, expected_product, _precision(dtype))


def _positioned(
    inputs: list[Tensor | None], kind: tuple[str, str], slot: Tensor, kept: Tensor
) -> Tensor:
    """On the device of `kept`, where the key and value are stored."""
    q, k, v, *others = (None if t is None else t.to(kept.device) for t in inputs)
    assert q is not None
    assert k is not None
    assert v is not None
    turns, temperature, weight = others
    assert turns is not None
    rope, norm = kind
    return fused.rotate_and_store(
        *(q, k, v, turns, temperature, weight), rope, norm, _EPS, slot.to(kept.device), kept
    )


def routing(device: torch.device) -> None:
    """All kinds of weights; numbers of experts that are no power of two."""
    for kind, num_experts, top_k, normalize in (
        ("sigmoid", 16, 1, False),
        ("softmax", 100, 7, True),
        ("softmax_of_chosen", 32, 4, False),
    ):
        logits = random(5, num_experts, seed=11)
        ids, weights = fused.choose_experts(logits, top_k, kind, normalize)
        with kernels_chosen(device):
            found = fused.choose_experts(logits.to(device), top_k, kind, normalize)
        equal(f"choices, {kind}", found[0], ids)
        agree(f"weights, {kind}", found[1], weights, _FINE)


def heads(device: torch.device) -> None:
    """Norms, RoPE and temperature in both orders; the key and value land in their slot alone."""
    angles = torch.arange(_D // 2)[None] * 0.37
    turns = torch.polar(torch.ones_like(angles), angles)  # [1, D / 2]
    weight = 1 + 0.3 * random(_N + _K, _D, seed=4)
    few = turns[:, : _D // 4]  # RoPE of half the components
    for rope, norm, norm_weight, temperature, dtype, turning in (
        ("interleaved", "after", None, None, torch.bfloat16, turns),
        ("half", "before", weight, None, torch.float32, turns),
        ("half", "none", None, None, torch.float32, few),
        ("none", "none", None, torch.full((1, 1, 1), 1.25), torch.bfloat16, turns),
    ):
        q, k, v = (random(1, n, _D, seed=n + 5).to(dtype) for n in (_N, _K, _K))
        cache = random(2, _K, _C, _D, seed=9).bfloat16()
        slot = torch.tensor([_C // 3])
        norm_weight = None if norm_weight is None else norm_weight.to(dtype)

        inputs = [q, k, v, turning, temperature, norm_weight]
        plain, fast = cache.clone(), cache.clone().to(device)
        expected = _positioned(inputs, (rope, norm), slot, plain)
        with kernels_chosen(device):
            found = _positioned(inputs, (rope, norm), slot, fast)
        agree(f"queries, rope {rope}", found, expected, _COARSE)
        agree(f"stored, rope {rope}", fast, plain, _COARSE)
        others = [other for other in range(_C) if other != int(slot)]
        equal(f"other slots, rope {rope}", fast[:, :, others], cache[:, :, others])


def attention(device: torch.device) -> None:
    """Lengths from one slot to all; what lies beyond must not matter, even if it is no number."""
    for dtype in (torch.float32, torch.bfloat16):
        q = random(1, _N, _D, seed=6).to(dtype)
        cache = random(2, _K, _C, _D, seed=7).to(dtype)
        for length in (1, 17, 64, _C):
            kept = cache.clone()
            kept[:, :, length:] = torch.nan
            seen, sinks = torch.tensor([length]), random(_N, seed=12)
            for of_heads in (None, sinks):
                expected = fused.decode_attention(q, kept, seen, 3, dtype, of_heads)
                with kernels_chosen(device):
                    there = None if of_heads is None else of_heads.to(device)
                    found = fused.decode_attention(
                        *(q.to(device), kept.to(device), seen.to(device)), 3, dtype, there
                    )
                agree(f"{length} slots in {dtype}", found, expected, _attention_precision(dtype))


def windows(device: torch.device) -> None:
    """Many tokens that see a window, or all, with sinks; after others and without."""
    for dtype, count, window in (
        (torch.float32, _C, 40),
        (torch.bfloat16, 70, 7),
        (torch.bfloat16, 70, None),
    ):
        q = random(count, _N, _D, seed=6).to(dtype)
        keys, values = random(2, _K, _C, _D, seed=7).to(dtype)
        sinks = random(_N, seed=12)
        expected = fused.windowed_attention(q, keys, values, window, sinks)
        with kernels_chosen(device):
            found = fused.windowed_attention(
                *(q.to(device), keys.to(device), values.to(device)), window, sinks.to(device)
            )
        agree(f"window {window} in {dtype}", found, expected, _attention_precision(dtype))


def latents(device: torch.device) -> None:
    """As many numbers as those of DeepSeek-V3; more heads than one program has."""
    rank, size, heads = 512, 576, 20
    for dtype in (torch.float32, torch.bfloat16):
        q = (random(1, heads, size, seed=6) / 4).to(dtype)
        kept = random(_C, size, seed=7).to(dtype)
        for length in (1, 17, _C):
            seen, rules = torch.tensor([length]), (3, rank, 0.1, dtype)
            expected = fused.decode_latents(q, kept, seen, *rules)
            with kernels_chosen(device):
                found = fused.decode_latents(q.to(device), kept.to(device), seen.to(device), *rules)
            agree(f"{length} latents in {dtype}", found, expected, _attention_precision(dtype))


def _attention_precision(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else HALF


def embedding(device: torch.device) -> None:
    """Rows of a table in pinned main memory."""
    table, ids = random(40, 96, seed=8).bfloat16(), torch.tensor([39, 0, 7, 7])
    with pinned_slots(device, 1, 8192) as arena:
        with arena.buffer(0) as buffer:
            torch.frombuffer(buffer, dtype=torch.bfloat16)[: table.numel()].copy_(table.flatten())
        address = torch.tensor([arena.device_address(0)], device=device)
        with kernels_chosen(device):
            found = fused.gather_rows(address, ids.to(device), 96, torch.bfloat16)
        equal("rows", found, table[ids])


def small_cases() -> Iterator[Case]:
    yield Case("kernels", "norms and activations", norms)
    yield Case("kernels", "choices of a router", routing)
    yield Case("kernels", "heads and the KV cache", heads)
    yield Case("kernels", "attention of one token", attention)
    yield Case("kernels", "attention of many tokens to windows", windows)
    yield Case("kernels", "attention of one token to latents", latents)
    yield Case("kernels", "rows of an embedding", embedding)
