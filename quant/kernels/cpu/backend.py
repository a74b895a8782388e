"""Knows the ops as calls of the compiled kernels for the processor; not how those compute.

Products of quantized weights quantize their input to 8 bits on the fly, which costs up to 0.5% of
a result's magnitude. Threads are as many as torch has: `torch.set_num_threads`.

Legend: T tokens, k choices a token, E experts of a layer, H hidden, O out, I in features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.kernels import tiled
from quant.kernels.cpu.few import ACTIVATIONS, FLOATS, matrix_argument
from quant.kernels.cpu.library import Library, LinearArgument, MoeArgument, library
from quant.kernels.experts import biases_for
from quant.layout import ExpertLayout
from quant.tensor import QuantizedWeight

_FLOAT_TOKENS = 16  # up to so many, float weights are read as they are; BLAS wins beyond


class CpuBackend:
    """The ops on CPU tensors. Raises QuantError where the library is not there."""

    def __init__(self, source: Library | None = None) -> None:
        self._library = source or library()

    @property
    def library(self) -> Library:
        return self._library

    @property
    def isa(self) -> str:
        return self._library.isa

    def linear_quantized(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return self.linears_quantized(x, (weight,))[0]

    def linears_quantized(self, x: Tensor, weights: Sequence[QuantizedWeight]) -> list[Tensor]:
        """x [T, I] by weights of one width [O, I] -> [T, O] each; x is quantized once."""
        rows = x.float().contiguous()  # [T, I]
        outs = [rows.new_empty(x.shape[0], weight.out_features) for weight in weights]  # [T, O]
        if x.shape[0]:
            calls = [_linear(weight, out) for weight, out in zip(weights, outs, strict=True)]
            self._library.linears(rows.data_ptr(), x.shape[0], calls, torch.get_num_threads())
        return [out.to(x.dtype) for out in outs]

    def linear_float(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[0] > _FLOAT_TOKENS or weight.dtype not in FLOATS:
            return tiled.linear_float(x.float(), weight).to(x.dtype)
        rows, weight = x.float().contiguous(), weight.contiguous()
        out = rows.new_empty(x.shape[0], weight.shape[0])  # [T, O]
        if x.shape[0]:
            self._library.linear_float(
                *(rows.data_ptr(), x.shape[0], weight.data_ptr(), FLOATS[weight.dtype]),
                *(*weight.shape, out.data_ptr(), torch.get_num_threads()),
            )
        return out.to(x.dtype)

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
        out = torch.zeros(*topk_ids.shape, hidden.shape[1])  # [T, k, H]
        self._experts(
            hidden,
            topk_ids,
            topk_weights,
            addresses,
            layout,
            activation,
            weight_on_input,
            span,
            biases,
            out,
            None,
        )
        return out

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
        self._experts(
            hidden,
            topk_ids,
            topk_weights,
            addresses,
            layout,
            activation,
            weight_on_input,
            span,
            biases,
            None,
            out,
        )

    def add_contributions(self, out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
        """By ascending expert, as `add_routed_experts` adds them."""
        parts, ids = contributions.contiguous(), topk_ids.contiguous()
        self._library.sum_contributions(
            *(parts.data_ptr(), ids.data_ptr(), *parts.shape),
            *(out.data_ptr(), torch.get_num_threads()),
        )

    def _experts(
        self,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        addresses: Tensor,
        layout: ExpertLayout,
        activation: str,
        weight_on_input: bool,
        span: tuple[int, int],
        biases: Tensor | None,
        contributions: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        num_tokens, num_choices = topk_ids.shape
        if not topk_ids.numel():
            return
        rows, ids = hidden.float().contiguous(), topk_ids.contiguous()
        weights, table = topk_weights.float().contiguous(), addresses.contiguous()
        added = None if biases is None else biases_for(biases, layout)
        call = MoeArgument(
            *(rows.data_ptr(), ids.data_ptr(), weights.data_ptr(), table.data_ptr()),
            *(num_tokens, num_choices, table.numel(), layout.hidden_size),
            *(layout.intermediate_size, *span, layout.scheme.bits, layout.scheme.group_size),
            *(ACTIVATIONS[activation], weight_on_input),
            None if contributions is None else contributions.data_ptr(),
            None if sums is None else sums.data_ptr(),
            None if added is None else added.data_ptr(),
        )
        if not self._library.routed_experts(call, torch.get_num_threads()):
            wrong = [e for e in ids.flatten().tolist() if not 0 <= e < table.numel()]
            raise AssertionError(f"expert {wrong[0]} of {table.numel()} was chosen")


def _linear(weight: QuantizedWeight, out: Tensor) -> LinearArgument:
    return LinearArgument(matrix_argument(weight), weight.out_features, out.data_ptr())
