"""Routed experts of float weights for captured steps, without our kernels.

Legend: T tokens, k choices a token, H hidden.
"""

import torch
from torch import Tensor

from moecli.models.moe import FloatExperts
from moecli.models.provider import Ready


class StackedExperts:
    """All experts of a layer in three tensors: what a captured step needs, without our kernels."""

    def __init__(
        self, experts: FloatExperts, num_experts: int, device: torch.device | str = "cpu"
    ) -> None:
        self.weight_on_input = experts.weight_on_input
        self.num_experts = num_experts
        self.load = experts.load
        self.device = device
        self.activation = experts.activation
        self.biases = {layer: bias.to(device) for layer, bias in experts.biases.items()}
        self.stacks: dict[int, tuple[Tensor, ...]] = {}

    def stack(self, layer: int) -> None:
        loaded = [self.load(layer, expert) for expert in range(self.num_experts)]
        parts = (torch.stack(part).to(self.device) for part in zip(*loaded, strict=True))
        self.stacks[layer] = tuple(parts)

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        """By whatever is stacked: `stack` must have been called before a step is captured."""
        gate, up, down = (part[topk_ids].to(hidden.dtype) for part in self.stacks[layer])
        weights = topk_weights[..., None]
        x = hidden[:, None].expand(*topk_ids.shape, -1)  # [T, k, H]
        x = x * weights if self.weight_on_input else x
        gates, ups = (torch.einsum("tkh,tkih->tki", x, part) for part in (gate, up))
        added = hidden.new_zeros(())
        if layer in self.biases:
            sizes = (gates.shape[-1], ups.shape[-1], hidden.shape[-1])
            of_gate, of_up, added = self.biases[layer].to(hidden.dtype)[topk_ids].split(sizes, -1)
            gates, ups = gates + of_gate, ups + of_up
        out = torch.einsum("tki,tkhi->tkh", self.activation(gates, ups), down) + added
        return Ready((out if self.weight_on_input else out * weights).sum(1))

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        raise AssertionError("a captured step cannot guess")

    def resident(self, layer: int) -> None:
        """No expert has bytes."""
