"""Knows a layer's routed experts as a loop over experts in plain torch; the products are injected.

Legend: T tokens, k choices a token, E experts of a layer, H hidden, O out, I in features.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.layout import ExpertLayout, ExpertWeights
from quant.tensor import QuantizedWeight

Bias = tuple[Tensor, Tensor, Tensor | None]  # of gate and up, and of down where it is added


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """That of gpt-oss: both are cut off at 7, and the product with up has one more of its gate."""
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * (gate * SWIGLU_ALPHA).sigmoid()


SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
ACTIVATIONS = {"silu": _silu, "clamped_swiglu": _clamped_swiglu}  # of gate and up


def expert_bias(
    biases: Tensor | None, expert: int, hidden_size: int, span: tuple[int, int]
) -> Bias | None:
    """What is added to the three products of an expert over `span` of its rows.

    That of down belongs to the span that begins with the first row, so that spans add up.
    """
    if biases is None:
        return None
    inner = inner_of(biases, hidden_size)
    gate, up, down = biases[expert].split((inner, inner, hidden_size))
    rows = slice(*span)
    return gate[rows], up[rows], down if span[0] == 0 else None


def inner_of(biases: Tensor, hidden_size: int) -> int:
    """I of biases [E, 2 I + H]: of those that a layout has, or more."""
    return (biases.shape[1] - hidden_size) // 2


def biases_for(biases: Tensor, layout: ExpertLayout) -> Tensor:
    """Biases [E, 2 I + H] of the rows that the layout has, the first ones; a copy if that is less.

    For kernels that know no others.
    """
    inner, rows = inner_of(biases, layout.hidden_size), layout.intermediate_size
    if inner == rows:
        return biases
    gate, up, down = biases.split((inner, inner, layout.hidden_size), dim=1)
    return torch.cat((gate[:, :rows], up[:, :rows], down), dim=1)


@dataclass(frozen=True)
class TorchBackend:
    """All ops from two products, which take and give fp32; on any device, exact over waves."""

    multiply_quantized: Callable[[Tensor, QuantizedWeight], Tensor]  # [T, I] -> [T, O]
    multiply_float: Callable[[Tensor, Tensor], Tensor]  # [T, I], [O, I] -> [T, O]

    def linear_quantized(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return self.multiply_quantized(x.float(), weight).to(x.dtype)

    def linears_quantized(self, x: Tensor, weights: Sequence[QuantizedWeight]) -> list[Tensor]:
        return [self.linear_quantized(x, weight) for weight in weights]

    def linear_float(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.multiply_float(x.float(), weight).to(x.dtype)

    def routed_experts(
        self,
        hidden: Tensor,  # [T, H]
        topk_ids: Tensor,  # int64 [T, k]
        topk_weights: Tensor,  # [T, k]
        addresses: Tensor,  # int64 [E]
        layout: ExpertLayout,
        *,
        activation: str,
        weight_on_input: bool,
        span: tuple[int, int],
        biases: Tensor | None = None,  # fp32 [E, 2 I + H]
    ) -> Tensor:
        """fp32 [T, k, H]"""
        num_tokens, hidden_size = hidden.shape
        num_choices = topk_ids.shape[1]
        x = hidden.float()  # [T, H]
        weights = topk_weights.float().reshape(-1, 1)  # [T * k, 1]
        out = x.new_zeros(num_tokens * num_choices, hidden_size)  # [T * k, H]
        where = addresses.tolist()
        for expert, positions in _by_expert(topk_ids.flatten().tolist(), len(where)).items():
            if where[expert] == 0:
                continue
            chosen = torch.tensor(positions, device=x.device)  # [n], which of T * k
            rows, row_weights = x[chosen // num_choices], weights[chosen]  # [n, H], [n, 1]
            blob = memory_at(where[expert], layout.nbytes, x.device)
            expert_weights = layout.views(blob).part(*span)
            bias = expert_bias(biases, expert, layout.hidden_size, span)
            if weight_on_input:
                result = self._expert(rows * row_weights, expert_weights, activation, bias)
            else:
                result = self._expert(rows, expert_weights, activation, bias).mul_(row_weights)
            out[chosen] = result
        return out.view(num_tokens, num_choices, hidden_size)

    def add_routed_experts(self, out: Tensor, *args: Any, **kwargs: Any) -> None:
        """out fp32 [T, H] += the sum over choices of `routed_experts`, which takes the rest."""
        out += self.routed_experts(*args, **kwargs).sum(dim=1)

    def add_contributions(self, out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
        out += contributions.sum(dim=1)

    def _expert(
        self, x: Tensor, weights: ExpertWeights, activation: str, bias: Bias | None
    ) -> Tensor:
        """x fp32 [n, H] -> fp32 [n, H]"""
        multiply = self.multiply_quantized
        gate, up = multiply(x, weights.gate), multiply(x, weights.up)  # [n, intermediate]
        if bias is not None:
            gate, up = gate + bias[0], up + bias[1]
        out = multiply(ACTIVATIONS[activation](gate, up), weights.down)
        return out if bias is None or bias[2] is None else out + bias[2]


def memory_at(address: int, nbytes: int, device: torch.device) -> Tensor:
    """The bytes at an address that `device` can read, as uint8 [nbytes], not copied."""
    if device.type == "cuda":
        return torch.as_tensor(_CudaBytes(address, nbytes), device=device)
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


class _CudaBytes:
    """Memory behind an address, in the words that torch takes it over by."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _by_expert(ids: list[int], num_experts: int) -> dict[int, list[int]]:
    """Expert -> which of the T * k choices name it."""
    chosen: dict[int, list[int]] = {}
    for position, expert in enumerate(ids):
        assert 0 <= expert < num_experts, f"expert {expert} of {num_experts} was chosen"
        chosen.setdefault(expert, []).append(position)
    return chosen
