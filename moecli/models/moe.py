"""Knows routing, shared experts and plain MLPs; routed experts are somebody else's, injected.

Legend of the shapes: T tokens, H hidden, E experts, k experts a token.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moecli.models.attention import Weight, Weights, dense
from moecli.models.config import ModelSpec
from moecli.models.fused import choose_experts, silu_mul
from moecli.models.provider import ExpertProvider, Ready, Resident
from moecli.models.routing import choose_grouped
from quant.kernels.experts import ACTIVATIONS, expert_bias
from quant.ops import linear

FloatExpert = tuple[Tensor, Tensor, Tensor]  # gate [I, H], up [I, H], down [H, I]


def gated_mlp(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    return linear(silu_mul(linear(x, gate), linear(x, up)), down)


class Mlp:
    """A dense MLP: that of a layer without experts (`mlp`), or the expert that all share."""

    def __init__(self, prefix: str, weights: Weights) -> None:
        names = ("gate_proj", "up_proj", "down_proj")
        self.weights = [weights(f"{prefix}.{name}") for name in names]

    def __call__(self, x: Tensor) -> Tensor:
        return gated_mlp(x, *self.weights)


class Routing(Protocol):
    """What a block asks which experts a token goes to: its Router, or a stand-in for it."""

    weight: Weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def guess(self, x: Tensor, count: int) -> Tensor: ...


class Router:
    """Which experts a token goes to, and how much they count."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Weights, dtype: torch.dtype) -> None:
        self.kind = spec.router
        self.top_k = spec.experts_per_token
        self.normalize = spec.normalize_topk
        self.weight = weights(f"layers.{layer}.router")  # [E, H]
        self.bias: Tensor | None = None  # [E]
        if spec.router_bias:
            self.bias = dense(weights, f"layers.{layer}.router.bias").to(dtype)
        self.grouped = spec.grouped_routing
        self.correction: Tensor | None = None  # fp32 [E]
        if self.grouped is not None:
            self.correction = dense(weights, f"layers.{layer}.router.correction").float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> topk_ids [T, k] int64, topk_weights [T, k] in x.dtype."""
        if self.grouped is None:
            return choose_experts(self._logits(x), self.top_k, self.kind, self.normalize)
        assert self.correction is not None, "a grouped router without its correction"
        logits = linear(x.float(), self.weight)
        ids, weights = choose_grouped(
            logits, self.correction, self.top_k, self.grouped, self.normalize
        )
        return ids, weights.to(x.dtype)

    def guess(self, x: Tensor, count: int) -> Tensor:
        """The `count` experts [T, count] that x [T, H] would probably choose."""
        logits = self._logits(x)
        if self.correction is not None:
            logits = logits.float().sigmoid() + self.correction
        return logits.topk(count, dim=-1).indices

    def _logits(self, x: Tensor) -> Tensor:
        """[T, E]"""
        logits = linear(x, self.weight)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)


class MoeBlock:
    """Routed experts plus, where the family has one, the shared expert."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        weights: Weights,
        experts: ExpertProvider,
        dtype: torch.dtype,
    ) -> None:
        self.layer = layer
        self.router: Routing = Router(spec, layer, weights, dtype)
        self.experts = experts
        self.shared: Mlp | None = None
        if spec.shared_intermediate_size:
            self.shared = Mlp(f"layers.{layer}.shared", weights)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        pending = self.experts.begin(self.layer, x, *self.router(x))
        if self.shared is None:
            return pending.result()
        shared = self.shared(x)
        return shared + pending.result()


def expert_biases(spec: ModelSpec, weights: Weights) -> dict[int, Tensor]:
    """By layer, fp32 [E, 2 I + H]: the biases of each expert's gate, up and down, in this order.

    Stored are those of gate and up as pairs, neighbours. Empty where experts have none.
    """
    if not spec.expert_bias:
        return {}
    found = {}
    for layer in spec.moe_layers:
        names = (f"layers.{layer}.experts.{name}_bias" for name in ("gate_up", "down"))
        gate_up, down = (dense(weights, name).float() for name in names)
        found[layer] = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2], down), dim=1).contiguous()
    return found


class FloatExperts:
    """The provider without offloading: float weights, kept wherever `load` has them."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[int, int], FloatExpert],
        biases: Mapping[int, Tensor] | None = None,
    ) -> None:
        """`load(layer, expert)` is asked anew each time an expert is needed.

        `biases`: as `expert_biases` gives them.
        """
        self.load = load
        self.biases = biases or {}
        self.weight_on_input = spec.weight_on_input
        self.activation = ACTIVATIONS[spec.expert_activation]

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        """[T, H], computed at once."""
        out = hidden.new_zeros(*topk_ids.shape, hidden.shape[-1])  # [T, k, H]
        for expert in topk_ids.unique().tolist():
            tokens, choices = torch.where(topk_ids == expert)
            x, weight = hidden[tokens], topk_weights[tokens, choices, None]
            if self.weight_on_input:
                out[tokens, choices] = self._expert(x * weight, layer, expert)
            else:
                out[tokens, choices] = self._expert(x, layer, expert) * weight
        return Ready(out.sum(dim=1))

    def _expert(self, x: Tensor, layer: int, expert: int) -> Tensor:
        """x [n, H] -> [n, H]"""
        gate, up, down = self.load(layer, expert)
        gates, ups = linear(x, gate), linear(x, up)  # [n, I]
        bias = expert_bias(self.biases.get(layer), expert, x.shape[1], (0, gates.shape[1]))
        if bias is None:
            return linear(self.activation(gates, ups), down)
        out = linear(self.activation(gates + bias[0], ups + bias[1]), down)
        return out if bias[2] is None else out + bias[2]

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """Nothing to fetch."""

    def resident(self, layer: int) -> Resident | None:
        """No bytes of experts lie anywhere."""
        return None
