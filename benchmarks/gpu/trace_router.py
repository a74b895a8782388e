"""Knows which experts a made-up run asks for: a table by position, so that all arms ask the same.

Legend: P positions, L MoE layers, E experts of a layer, k choices a token, T tokens, H hidden.
"""

from typing import Literal

import torch
from torch import Tensor

from moecli.models.moe import Routing

Skew = Literal["uniform", "zipf"]
ZIPF_EXPONENT = 1.0
STAY = 2.0  # added to the log-probability of what the last token chose in this layer


def make_trace(
    skew: Skew, num_positions: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0
) -> Tensor:
    """Choices int64 [P, L, k], distinct within a token and layer.

    "uniform": each expert alike. "zipf": each layer has favourites of its own (probability falls
    as 1 / rank), and a token tends to stay with the choices of the one before.
    """
    generator = torch.Generator().manual_seed(seed)

    def gumbel(*shape: int) -> Tensor:
        return -(-torch.rand(shape, generator=generator).clamp(1e-9, 1 - 1e-6).log()).log()

    if skew == "uniform":
        return gumbel(num_positions, num_layers, num_experts).topk(top_k, dim=-1).indices
    ranks = gumbel(num_layers, num_experts).argsort(-1).argsort(-1)  # [L, E]
    favour = -ZIPF_EXPONENT * (ranks + 1.0).log()
    trace = torch.empty(num_positions, num_layers, top_k, dtype=torch.int64)
    for position in range(num_positions):
        scores = favour + gumbel(num_layers, num_experts)
        if position:
            scores.scatter_add_(1, trace[position - 1], torch.full((num_layers, top_k), STAY))
        trace[position] = scores.topk(top_k, dim=-1).indices
    return trace


class Clock:
    """Counts the tokens of a conversation where they are computed: nobody tells it in a step."""

    def __init__(self, device: torch.device) -> None:
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def restart(self) -> None:
        self.position.zero_()


class Trace:
    """A table on the device that can be exchanged for another of its shape, under any graph."""

    def __init__(self, choices: Tensor, device: torch.device) -> None:
        self.choices = choices.to(device)  # [P, L, k]

    @property
    def num_layers(self) -> int:
        return self.choices.shape[1]

    def become(self, choices: Tensor) -> None:
        self.choices.copy_(choices)


class TraceRouter:
    """Does the work of the router it replaces, and returns the choices of the trace instead.

    That of the last layer sets the clock forward.
    """

    def __init__(self, router: Routing, trace: Trace, clock: Clock, layer_index: int) -> None:
        self._router, self._trace, self._clock = router, trace, clock
        self._layer_index = layer_index
        self.weight = router.weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] -> topk_ids [T, k], topk_weights [T, k]; no word from the host."""
        _, weights = self._router(x)
        choices, position = self._trace.choices, self._clock.position
        offsets = torch.arange(x.shape[0], device=choices.device)
        positions = (position + offsets) % choices.shape[0]  # [T]
        chosen = choices[:, self._layer_index].index_select(0, positions)
        if self._layer_index == self._trace.num_layers - 1:
            position.add_(x.shape[0])
        return chosen, weights

    def guess(self, x: Tensor, count: int) -> Tensor:
        return self._router.guess(x, count)
