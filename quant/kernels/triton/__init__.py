"""Knows which Triton kernels serve which op; each module is imported when it is first needed."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.layout import ExpertLayout
from quant.tensor import QuantizedWeight

DECODE_TOKENS = 8  # up to here every choice reads its expert by itself
_WIDENED_NBYTES = 64 << 20  # of a weight in another dtype than x: at most so much at once


class TritonBackend:
    """The ops by Triton kernels: on CUDA tensors, or anywhere in Triton's interpreter."""

    def linear_quantized(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        result: Tensor = _kernels("linear").linear_quantized(x, weight)
        return result

    def linears_quantized(self, x: Tensor, weights: Sequence[QuantizedWeight]) -> list[Tensor]:
        return [self.linear_quantized(x, weight) for weight in weights]

    def linear_float(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == weight.dtype:
            return torch.nn.functional.linear(x, weight)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        rows = max(1, _WIDENED_NBYTES // (weight.shape[1] * dtype.itemsize))
        parts = [torch.nn.functional.linear(x.to(dtype), w.to(dtype)) for w in weight.split(rows)]
        return torch.cat(parts, dim=-1).to(x.dtype)

    def routed_experts(
        self,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        addresses: Tensor,
        layout: ExpertLayout,
        *,
        activation: str,
        weight_on_input: bool,
        span: tuple[int, int],
        biases: Tensor | None = None,
    ) -> Tensor:
        """Every choice as a token with one choice: then sums are contributions."""
        num_choices = topk_ids.shape[1]
        out = hidden.new_zeros(topk_ids.numel(), hidden.shape[1], dtype=torch.float32)  # [T * k, H]
        self.add_routed_experts(
            out,
            hidden.repeat_interleave(num_choices, dim=0),
            topk_ids.reshape(-1, 1),
            topk_weights.reshape(-1, 1),
            addresses,
            layout,
            activation=activation,
            weight_on_input=weight_on_input,
            span=span,
            biases=biases,
        )
        return out.view(-1, num_choices, hidden.shape[1])

    def add_routed_experts(
        self,
        out: Tensor,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        addresses: Tensor,
        layout: ExpertLayout,
        *,
        activation: str,
        weight_on_input: bool,
        span: tuple[int, int],
        biases: Tensor | None = None,
    ) -> None:
        few = topk_ids.shape[0] <= DECODE_TOKENS
        _kernels("experts" if few else "grouped").add_routed_experts(
            out,
            hidden,
            topk_ids,
            topk_weights,
            addresses,
            layout,
            activation=activation,
            weight_on_input=weight_on_input,
            span=span,
            biases=biases,
        )

    def add_contributions(self, out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
        out += contributions.sum(dim=1)


def _kernels(name: str) -> Any:
    return importlib.import_module(f"quant.kernels.triton.{name}")
