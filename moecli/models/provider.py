"""Knows what a forward pass asks of whoever computes its routed experts, and nothing of how."""

from typing import Protocol

from torch import Tensor


class ExpertProvider(Protocol):
    """Computes routed experts wherever their bytes lie."""

    def __call__(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """Weighted sum of the chosen experts.

        Shapes: hidden [T, H] in the compute dtype; topk_ids [T, k] int64; topk_weights [T, k] in
        the compute dtype; returns [T, H] in the compute dtype. T may be 0.
        """
        ...

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """A guess, [T, k] int64, of what `layer` will choose; returns at once."""
        ...
