"""Knows what a forward pass asks of whoever computes its routed experts, and nothing of how."""

from array import array
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quant.layout import ExpertLayout


class Pending(Protocol):
    """Routed experts that were asked for; other work may be done before their result is."""

    def result(self) -> Tensor:
        """Weighted sum of the chosen experts, [T, H] in the compute dtype; asked for once."""
        ...


class ExpertProvider(Protocol):
    """Computes routed experts wherever their bytes lie."""

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        """Start computing the weighted sum of the chosen experts.

        Shapes: hidden [T, H] in the compute dtype; topk_ids [T, k] int64; topk_weights [T, k] in
        the compute dtype. T may be 0. What is started here overlaps with the shared expert, which
        is computed before the result is asked for. `hidden` stays as it is until then.
        """
        ...

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """A guess, [T, k] int64, of what `layer` will choose; returns at once."""
        ...

    def resident(self, layer: int) -> "Resident | None":
        """Where a layer's experts may be used without `begin`, now; one object for good."""
        ...


@dataclass(frozen=True)
class Resident:
    """A layer's experts that may be used where they lie without `begin`: what came stays for good.

    Whoever does so adds 1 to `asked` of each expert that a step wants, and to `hits` for each.
    """

    addresses: "array[int]"  # int64 [E]; 0: it has not come, `begin` brings it
    asked: "array[int]"  # int64 [E]
    hits: "array[int]"  # int64 [1]
    layout: ExpertLayout
    activation: str  # by its name in quant.ops
    weight_on_input: bool
    biases: Tensor | None  # fp32 [E, 2 I + H]


@dataclass(frozen=True)
class Ready:
    """A Pending that is there already."""

    value: Tensor  # [T, H]

    def result(self) -> Tensor:
        return self.value
