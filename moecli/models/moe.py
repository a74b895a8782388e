"""Knows routing, shared experts and plain MLPs; routed experts are somebody else's, injected.

Legend of the shapes: T tokens, H hidden, E experts, k experts a token.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moecli.models.attention import Weight, Weights, dense
from moecli.models.config import ModelSpec
from moecli.models.fused import choose_experts, silu_mul
from moecli.models.provider import ExpertProvider, Ready
from moecli.models.routing import choose_grouped
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

    def __init__(self, spec: ModelSpec, layer: int, weights: Weights) -> None:
        self.kind = spec.router
        self.top_k = spec.experts_per_token
        self.normalize = spec.normalize_topk
        self.weight = weights(f"layers.{layer}.router")  # [E, H]
        self.grouped = spec.grouped_routing
        self.correction: Tensor | None = None  # fp32 [E]
        if self.grouped is not None:
            self.correction = dense(weights, f"layers.{layer}.router.correction").float()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> topk_ids [T, k] int64, topk_weights [T, k] in x.dtype."""
        if self.grouped is None:
            logits = linear(x, self.weight)  # [T, E]
            return choose_experts(logits, self.top_k, self.kind, self.normalize)
        assert self.correction is not None, "a grouped router without its correction"
        logits = linear(x.float(), self.weight)
        ids, weights = choose_grouped(
            logits, self.correction, self.top_k, self.grouped, self.normalize
        )
        return ids, weights.to(x.dtype)

    def guess(self, x: Tensor, count: int) -> Tensor:
        """The `count` experts [T, count] that x [T, H] would probably choose."""
        logits = linear(x, self.weight)  # [T, E]
        if self.correction is not None:
            logits = logits.float().sigmoid() + self.correction
        return logits.topk(count, dim=-1).indices


class MoeBlock:
    """Routed experts plus, where the family has one, the shared expert."""

    def __init__(
        self, spec: ModelSpec, layer: int, weights: Weights, experts: ExpertProvider
    ) -> None:
        self.layer = layer
        self.router: Routing = Router(spec, layer, weights)
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


class FloatExperts:
    """The provider without offloading: float weights, kept wherever `load` has them."""

    def __init__(self, spec: ModelSpec, load: Callable[[int, int], FloatExpert]) -> None:
        """`load(layer, expert)` is asked anew each time an expert is needed."""
        self.load = load
        self.weight_on_input = spec.weight_on_input

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        """[T, H], computed at once."""
        out = hidden.new_zeros(*topk_ids.shape, hidden.shape[-1])  # [T, k, H]
        for expert in topk_ids.unique().tolist():
            tokens, choices = torch.where(topk_ids == expert)
            x, weight = hidden[tokens], topk_weights[tokens, choices, None]
            if self.weight_on_input:
                out[tokens, choices] = gated_mlp(x * weight, *self.load(layer, expert))
            else:
                out[tokens, choices] = gated_mlp(x, *self.load(layer, expert)) * weight
        return Ready(out.sum(dim=1))

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """Nothing to fetch."""
