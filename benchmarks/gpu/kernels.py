"""Knows how fast single kernels are at the shapes of real models, beside what memory allows.

Experts rotate, so that what is read was not read just before. Legend: T tokens, k choices a token,
E experts, H hidden.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import device_of, host_block, sizes_of
from benchmarks.gpu.random_experts import expert_blobs
from benchmarks.gpu.report import Section
from benchmarks.gpu.roofline import share
from benchmarks.gpu.sizes import AttentionShape, ExpertShape, LinearShape, Sizes
from benchmarks.gpu.timing import seconds_each
from moecli.backends import use_kernels
from moecli.models import fused
from quant import ops
from quant.layout import ExpertLayout
from quant.quantize import quantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

_MAX_LAUNCHES = 32  # of one graph
_TERA = 1e12


def measure(section: Section, tiny: bool, found: dict[str, Any]) -> None:
    device, sizes = device_of(tiny), sizes_of(tiny)
    use_kernels("triton", device)
    vram = _rate(found, "vram_copy")
    link = _rate(found, "link_copy")
    shapes = [(shape, scheme) for shape in sizes.experts for scheme in sizes.schemes]
    bind = functools.partial
    for shape, scheme in shapes:
        what, args = f"{shape.name} {scheme.name}", (device, sizes, shape, scheme)
        section.part(f"decode, {what}", bind(decode, *args, vram, pinned=False))
        section.part(f"decode over the link, {what}", bind(decode, *args, link, pinned=True))
    for linear in sizes.linears:
        section.part(f"dense, {linear.name}", bind(dense, device, sizes, linear, vram))
    for heads in sizes.attention:
        section.part(f"attention, {heads.name}", bind(attention, device, sizes, heads, vram))
    for shape, scheme in shapes:
        for num_tokens in sizes.grouped_tokens:
            name = f"prefill, {shape.name} {scheme.name}, {num_tokens} tokens"
            section.part(name, bind(grouped, device, sizes, shape, scheme, num_tokens))
            _free(device)


def _rate(found: dict[str, Any], part: str) -> float | None:
    parts = found.get("machine", {}).get("parts", {})
    return parts.get(part, {}).get("result", {}).get("bytes_per_s")


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def placed_experts(
    layout: ExpertLayout, count: int, device: torch.device, pinned: bool
) -> tuple[Tensor, list[int]]:
    """Memory that holds `count` experts, and their addresses for kernels."""
    blobs = expert_blobs(layout, 1, device)
    nbytes = layout.slot_nbytes
    block = (
        host_block(device, count * nbytes)
        if pinned
        else torch.empty(count * nbytes, dtype=torch.uint8, device=device)
    )
    for i in range(count):
        block[i * nbytes : i * nbytes + layout.nbytes].copy_(blobs[0])
    return block, [block.data_ptr() + i * nbytes for i in range(count)]


def decode(
    device: torch.device,
    sizes: Sizes,
    shape: ExpertShape,
    scheme: QuantScheme,
    rate: float | None,
    pinned: bool,
) -> dict[str, Any]:
    """Routed experts of few tokens, which all choose different ones: bytes over time."""
    layout = shape.layout(scheme)
    fitting = max(1, sizes.rotation_nbytes // layout.slot_nbytes)
    num_experts = max(min(fitting, shape.num_experts), max(sizes.decode_tokens) * shape.top_k)
    num_experts = min(num_experts, shape.num_experts)
    block, addresses = placed_experts(layout, num_experts, device, pinned)
    table = torch.zeros(shape.num_experts, dtype=torch.int64)  # [E]
    table[:num_experts] = torch.tensor(addresses)
    table = table.to(device)
    rows = {}
    for num_tokens in sizes.decode_tokens:
        choices = num_tokens * shape.top_k
        if choices > num_experts:
            continue
        launches = _decode_launches(device, shape, layout, num_tokens, num_experts, table)
        seconds = seconds_each(launches, device, sizes.repeats)
        nbytes = choices * layout.nbytes
        rows[str(num_tokens)] = {
            "seconds": seconds,
            "nbytes": nbytes,
            "bytes_per_s": nbytes / seconds,
            "share": share(nbytes / seconds, rate),
        }
    del block
    return {"place": "pinned" if pinned else "vram", "experts": num_experts, "tokens": rows}


def _decode_launches(
    device: torch.device,
    shape: ExpertShape,
    layout: ExpertLayout,
    num_tokens: int,
    num_experts: int,
    table: Tensor,
) -> list[Callable[[], None]]:
    """Launches that read different experts one after the other."""
    choices = num_tokens * shape.top_k
    hidden = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=_dtype(device))
    weights = torch.full((num_tokens, shape.top_k), 0.5, device=device)
    out = torch.zeros(num_tokens, shape.hidden_size, device=device)
    count = min(_MAX_LAUNCHES, max(2, num_experts // choices))
    launches = []
    for turn in range(count):
        ids = (torch.arange(choices) + turn * choices) % num_experts
        chosen = ids.view(num_tokens, shape.top_k).to(device)
        launches.append(
            functools.partial(
                ops.add_routed_experts,
                *(out, hidden, chosen, weights, table, layout),
                weight_on_input=shape.weight_on_input,
            )
        )
    return launches


def random_weight(
    out_features: int, in_features: int, scheme: QuantScheme, device: torch.device
) -> QuantizedWeight:
    """Random codes with one scale; a tiny one is quantized in earnest."""
    if out_features * in_features < 1 << 16:
        values = torch.randn(out_features, in_features) / in_features**0.5
        return quantize(values, scheme, "nearest").to(device)
    packed = torch.randint(
        *(-(1 << 31), (1 << 31) - 1, scheme.packed_shape(out_features, in_features)),
        dtype=torch.int32,
        device=device,
    )
    shape = scheme.scale_shape(out_features, in_features)
    value = 3.5 / (1 << scheme.bits) / in_features**0.5
    scale = torch.full(shape, value, dtype=torch.bfloat16, device=device)
    return QuantizedWeight(packed, scale, scheme)


def dense(
    device: torch.device, sizes: Sizes, shape: LinearShape, rate: float | None
) -> dict[str, Any]:
    """A dense product at one token, in every scheme, and bf16 by torch beside it."""
    x = torch.randn(1, shape.in_features, device=device, dtype=_dtype(device))
    rows: dict[str, Any] = {}
    for scheme in sizes.schemes:
        if shape.in_features % scheme.group_size:
            continue
        first = random_weight(shape.out_features, shape.in_features, scheme, device)
        count = min(_MAX_LAUNCHES, max(2, sizes.rotation_nbytes // first.nbytes))
        weights = [first, *(_copied(first) for _ in range(count - 1))]
        launches = [functools.partial(ops.linear, x, weight) for weight in weights]
        seconds = seconds_each(launches, device, sizes.repeats)
        rows[scheme.name] = _row(first.nbytes, seconds, rate)
        del weights, launches
    weight = torch.randn(shape.out_features, shape.in_features, device=device, dtype=x.dtype)
    count = min(_MAX_LAUNCHES, max(2, sizes.rotation_nbytes // weight.nbytes))
    copies = [weight.clone() for _ in range(count)]
    launches = [functools.partial(torch.nn.functional.linear, x, copy) for copy in copies]
    rows["torch"] = _row(weight.nbytes, seconds_each(launches, device, sizes.repeats), rate)
    return rows


def _copied(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.packed.clone(), weight.scale.clone(), weight.scheme)


def _row(nbytes: int, seconds: float, rate: float | None) -> dict[str, float | None]:
    found = nbytes / seconds
    return {
        "seconds": seconds,
        "nbytes": nbytes,
        "bytes_per_s": found,
        "share": share(found, rate),
    }


def attention(
    device: torch.device, sizes: Sizes, shape: AttentionShape, rate: float | None
) -> dict[str, Any]:
    """Attention of one token, against the bytes of keys and values that it reads."""
    from moecli.models.device_step import num_splits

    dtype = _dtype(device)
    rows = {}
    for length in sizes.positions:
        kept_shape = (2, shape.num_kv_heads, length, shape.head_dim)
        first = torch.randn(kept_shape, device=device, dtype=dtype)
        count = min(_MAX_LAUNCHES, max(2, sizes.rotation_nbytes // first.nbytes))
        caches = [first, *(first.clone() for _ in range(count - 1))]
        q = torch.randn(1, shape.num_heads, shape.head_dim, device=device, dtype=dtype)
        seen = torch.tensor([length], device=device)
        splits = num_splits(length, shape.num_kv_heads, device)
        launches = [
            functools.partial(fused.decode_attention, q, kept, seen, splits, dtype)
            for kept in caches
        ]
        row = _row(first.nbytes, seconds_each(launches, device, sizes.repeats), rate)
        rows[str(length)] = {**row, "splits": splits}
        del caches, launches
    return rows


def grouped(
    device: torch.device, sizes: Sizes, shape: ExpertShape, scheme: QuantScheme, num_tokens: int
) -> dict[str, Any]:
    """Routed experts of many tokens in TFLOP/s, beside one dense product with as many FLOPs."""
    layout, dtype = shape.layout(scheme), _dtype(device)
    _block, addresses = placed_experts(layout, shape.num_experts, device, pinned=False)
    table = torch.tensor(addresses, device=device)  # [E]
    hidden = torch.randn(num_tokens, shape.hidden_size, device=device, dtype=dtype)
    scores = torch.rand(num_tokens, shape.num_experts, device=device)
    ids = scores.topk(shape.top_k).indices
    weights = torch.full((num_tokens, shape.top_k), 0.5, device=device)
    out = torch.zeros(num_tokens, shape.hidden_size, device=device)
    launch = functools.partial(
        ops.add_routed_experts,
        *(out, hidden, ids, weights, table, layout),
        weight_on_input=shape.weight_on_input,
    )
    seconds = seconds_each([launch] * 2, device, max(2, sizes.repeats // 3))
    choices = num_tokens * shape.top_k
    flops = 2 * choices * 3 * shape.hidden_size * shape.intermediate_size
    a = torch.randn(choices, shape.hidden_size, device=device, dtype=dtype)
    b = torch.randn(shape.hidden_size, 3 * shape.intermediate_size, device=device, dtype=dtype)
    plain = seconds_each([lambda: a @ b] * 2, device, max(2, sizes.repeats // 3))
    return {
        "seconds": seconds,
        "tflops": flops / seconds / _TERA,
        "torch_matmul_tflops": flops / plain / _TERA,
        "tokens_an_expert": choices / shape.num_experts,
    }
