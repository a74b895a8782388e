"""Random experts of one layer in memory, and what they compute in fp64.

Legend: T tokens, k choices a token, H hidden.
"""

import torch
from torch import Tensor

from quant.layout import ExpertLayout, ExpertWeights
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

_GUARD_NBYTES = 4096
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weight(
    out_features: int, in_features: int, scheme: QuantScheme, seed: int
) -> QuantizedWeight:
    """Every code occurs, -2^(bits-1) too, and scales of either sign."""
    generator = torch.Generator().manual_seed(seed)
    packed_shape = scheme.packed_shape(out_features, in_features)
    packed = torch.randint(-(2**31), 2**31, packed_shape, generator=generator).int()
    scale = torch.randn(scheme.scale_shape(out_features, in_features), generator=generator)
    return QuantizedWeight(packed, (scale / scheme.zero_point / 8).bfloat16(), scheme)


class Experts:
    """What lies around an expert is NaN when it is read as scales."""

    def __init__(self, layout: ExpertLayout, num_experts: int = 5, device: str = "cpu") -> None:
        self.layout = layout
        self.num_experts = num_experts
        self._stride = -(-layout.nbytes // 64) * 64 + _GUARD_NBYTES
        memory = torch.full((_GUARD_NBYTES + num_experts * self._stride,), 0xFF, dtype=torch.uint8)
        for expert in range(num_experts):
            weights = (
                random_weight(*shape, layout.scheme, 3 * expert + place)
                for place, shape in enumerate(layout.projections.values())
            )
            layout.write(ExpertWeights(*weights), self._blob(memory, expert))
        self._host, self._memory = memory, memory.to(device)

    def _blob(self, memory: Tensor, expert: int) -> Tensor:
        start = _GUARD_NBYTES + expert * self._stride
        return memory[start : start + self.layout.nbytes]

    def blob(self, expert: int) -> Tensor:
        """uint8 [nbytes]"""
        return self._blob(self._memory, expert)

    def addresses(self, present: set[int] | None = None) -> Tensor:
        """int64 [E], 0 for those that are not `present`."""
        return torch.tensor(
            [
                self.blob(expert).data_ptr() if present is None or expert in present else 0
                for expert in range(self.num_experts)
            ],
            device=self._memory.device,
        )

    def exact(
        self,
        expert: int,
        x: Tensor,
        span: tuple[int, int] | None = None,
        biases: Tensor | None = None,
        activation: str = "silu",
    ) -> Tensor:
        """fp64 [H] of x [H]; biases [E, 2 I + H]"""
        weights = self.layout.views(self._blob(self._host, expert))
        gate, up, down = (
            dequantize(weight, torch.float64) for weight in (weights.gate, weights.up, weights.down)
        )
        part = slice(*span) if span else slice(None)
        gates, ups, constant = x @ gate.t(), x @ up.t(), torch.zeros((), dtype=torch.float64)
        if biases is not None:
            sizes = (len(gate), len(up), len(down))
            of_gate, of_up, of_down = biases[expert].cpu().double().split(sizes)
            gates, ups = gates + of_gate, ups + of_up
            constant = of_down if span is None or span[0] == 0 else constant
        return gated(gates, ups, activation)[..., part] @ down.t()[part] + constant

    def contributions(
        self,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        weight_on_input: bool,
        *,
        present: set[int] | None = None,
        span: tuple[int, int] | None = None,
        biases: Tensor | None = None,
        activation: str = "silu",
    ) -> Tensor:
        """fp64 [T, k, H] on the CPU"""
        hidden, ids, weights = hidden.cpu().double(), ids.cpu(), weights.cpu().double()
        out = torch.zeros(*ids.shape, hidden.shape[1], dtype=torch.float64)
        for t in range(ids.shape[0]):
            for k in range(ids.shape[1]):
                expert, weight = int(ids[t, k]), weights[t, k]
                if present is not None and expert not in present:
                    continue
                x = hidden[t] * weight if weight_on_input else hidden[t]
                out[t, k] = self.exact(expert, x, span, biases, activation)
                if not weight_on_input:
                    out[t, k] *= weight
        return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What stands between an expert's projections, by the names of ops; said anew, in fp64."""
    if activation == "silu":
        return gate / (1 + (-gate).exp()) * up
    assert activation == "clamped_swiglu"
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate / (1 + (-1.702 * gate).exp()) * (up + 1)


def random_biases(layout: ExpertLayout, num_experts: int) -> Tensor:
    """fp32 [E, 2 I + H], some of them beyond where gates are cut off."""
    return 6 * random(num_experts, 2 * layout.intermediate_size + layout.hidden_size, seed=7)


def assert_close(actual: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    """`tolerance` is of the largest value."""
    assert actual.shape == exact.shape
    if exact.numel():
        error = (actual.cpu().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"differs by {error:.1e} of the largest value"
