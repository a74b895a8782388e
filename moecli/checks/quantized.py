"""Knows the cases of products with quantized weights: routed experts and dense ones.

What is compared with is computed on the processor in fp64, from dequantized weights.

Legend: T tokens, k choices a token, E experts, H hidden, I intermediate, O out.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from moecli.checks.compare import EXACT, HALF, agree, kernels_chosen, random
from moecli.selfcheck import Case
from quant import ops
from quant.kernels.experts import ACTIVATIONS, expert_bias
from quant.layout import ExpertLayout, ExpertWeights
from quant.quantize import dequantize, quantize
from quant.scheme import BITS, GROUP_SIZES, QuantScheme
from quant.tensor import QuantizedWeight

_HIDDEN = 128
_EXPERTS, _ABSENT = 4, 2  # of which one has no address


def _rounded(values: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    return quantize(values / values.shape[1] ** 0.5, scheme, "nearest")


def make_experts(layout: ExpertLayout, count: int, seed: int = 0) -> list[Tensor]:
    """Random experts, uint8 [nbytes] each, in main memory."""
    blobs = []
    for index in range(count):
        parts = [
            _rounded(random(*shape, seed=seed + 10 * index + i), layout.scheme)
            for i, shape in enumerate(layout.projections.values())
        ]
        blobs.append(torch.empty(layout.slot_nbytes, dtype=torch.uint8))
        layout.write(ExpertWeights(*parts), blobs[-1])
    return blobs


def plain_experts(
    hidden: Tensor,  # [T, H]
    ids: Tensor,  # [T, k]
    weights: Tensor,  # [T, k]
    blobs: list[Tensor],
    layout: ExpertLayout,
    absent: int | None,
    on_input: bool,
    span: tuple[int, int],
    biases: Tensor | None = None,  # [E, 2 I + H]
    activation: str = "silu",
) -> Tensor:
    """What routed experts add up to, fp64 [T, H], from dequantized weights."""
    rows, x = slice(*span), hidden.double()
    out = torch.zeros_like(x)
    for token, choice in product(range(ids.shape[0]), range(ids.shape[1])):
        expert, weight = int(ids[token, choice]), float(weights[token, choice])
        if expert == absent:
            continue
        parts = layout.views(blobs[expert])
        gate, up, down = (dequantize(w).double() for w in (parts.gate, parts.up, parts.down))
        row = x[token] * weight if on_input else x[token]
        gates, ups = gate[rows] @ row, up[rows] @ row
        bias = expert_bias(biases, expert, layout.hidden_size, span)
        if bias is not None:
            gates, ups = gates + bias[0], ups + bias[1]
        result = down[:, rows] @ ACTIVATIONS[activation](gates, ups)
        if bias is not None and bias[2] is not None:
            result = result + bias[2]
        out[token] += result if on_input else result * weight
    return out


def experts_case(
    bits: int,
    group_size: int,
    num_tokens: int,
    dtype: torch.dtype,
    tolerance: float,
    activation: str = "silu",
    biased: bool = False,
) -> Callable[[torch.device], None]:
    """Whole experts and a span of their rows; weights on output and on input; one not there."""

    def run(device: torch.device) -> None:
        half = max(64, group_size)
        layout = ExpertLayout(_HIDDEN, 2 * half, QuantScheme(bits, group_size))
        blobs = make_experts(layout, _EXPERTS)
        placed = [blob.to(device) for blob in blobs]
        table = torch.tensor([blob.data_ptr() for blob in placed])
        table[_ABSENT] = 0
        hidden = random(num_tokens, _HIDDEN, seed=1).to(dtype)
        ids = random(num_tokens, _EXPERTS, seed=2).topk(2).indices
        weights = random(num_tokens, 2, seed=3).sigmoid().to(dtype)
        begin = random(num_tokens, _HIDDEN, seed=4)
        biases = random(_EXPERTS, 4 * half + _HIDDEN, seed=8) if biased else None
        for on_input, span in ((False, (0, 2 * half)), (True, (half, 2 * half))):
            out = begin.clone().to(device)
            with kernels_chosen(device):
                ops.add_routed_experts(
                    *(out, hidden.to(device), ids.to(device), weights.to(device)),
                    *(table.to(device), layout),
                    weight_on_input=on_input,
                    span=span,
                    activation=activation,
                    biases=None if biases is None else biases.to(device),
                )
            expected = plain_experts(
                *(hidden, ids, weights, blobs, layout, _ABSENT, on_input, span),
                *(biases, activation),
            )
            agree(f"rows {span}", out.cpu() - begin, expected, tolerance)

    return run


def linear_case(bits: int, group_size: int) -> Callable[[torch.device], None]:
    """One token and a few by vectors, many by matrices."""

    def run(device: torch.device) -> None:
        weight = _rounded(random(40, _HIDDEN, seed=5), QuantScheme(bits, group_size))
        exact = dequantize(weight).double()  # [O, I]
        for num_tokens, dtype, tolerance in (
            (1, torch.float32, EXACT),
            (3, torch.bfloat16, HALF),
            (20, torch.bfloat16, HALF),
            (20, torch.float32, 1e-3),
        ):
            x = random(num_tokens, _HIDDEN, seed=6).to(dtype)
            with kernels_chosen(device):
                found = ops.linear(x.to(device), weight.to(device))
            agree(f"{num_tokens} tokens in {dtype}", found, x.double() @ exact.t(), tolerance)

    return run


def quantized_cases() -> Iterator[Case]:
    for bits, group in product(BITS, GROUP_SIZES):
        name = f"int{bits}-g{group}"
        few = experts_case(bits, group, 2, torch.float32, EXACT)
        many = experts_case(bits, group, 10, torch.bfloat16, HALF)
        yield Case("kernels", f"experts of a few tokens, {name}", few)
        yield Case("kernels", f"experts of many tokens, {name}", many)
        yield Case("kernels", f"dense weights, {name}", linear_case(bits, group))
    for what, arguments in (
        ("a few", (2, torch.float32, EXACT)),
        ("many", (10, torch.bfloat16, HALF)),
    ):
        run = experts_case(4, 32, *arguments, activation="clamped_swiglu", biased=True)
        yield Case("kernels", f"experts of {what} tokens, with biases and limits", run)
