"""Knows how a model computes experts from their bytes; not where those lie, nor on which device.

Legend: T tokens, k choices a token, H hidden, E experts of a layer.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant import ops
from quant.layout import ExpertLayout

Span = tuple[int, int]  # inner rows begin..end-1 of an expert


def address_table(addresses: Mapping[int, int], num_experts: int) -> Tensor:
    """Where each expert lies, int64 [E] in main memory, as the ops want it; 0: nowhere."""
    table = array("q", bytes(8 * num_experts))  # setting a tensor's elements takes 20 times longer
    for expert, address in addresses.items():
        table[expert] = address
    return torch.frombuffer(table, dtype=torch.int64)  # [E]


@dataclass(frozen=True)
class ExpertMath:
    """How this model computes an expert from its bytes.

    `biases`: of each MoE layer fp32 [E, 2 I + H], where experts have some, on the device that
    computes. Where the layout is that of the first rows of experts, they are still whole.
    """

    layout: ExpertLayout
    weight_on_input: bool
    activation: str = "silu"
    biases: tuple[Tensor, ...] = ()

    def of_first_rows(self, layout: ExpertLayout) -> "ExpertMath":
        """The same for bytes that hold the first rows of each expert alone."""
        return replace(self, layout=layout)

    def on_host(self) -> "ExpertMath":
        """The same where the processor computes."""
        return replace(self, biases=tuple(biases.cpu() for biases in self.biases))

    def add(
        self,
        index: int,
        out: Tensor,  # fp32 [T, H]
        hidden: Tensor,  # [T, H]
        topk_ids: Tensor,  # [T, k]
        topk_weights: Tensor,  # [T, k]
        addresses: Tensor,  # int64 [E]
        span: Span | None = None,
    ) -> None:
        """out += what the experts with an address contribute, or `span` of their inner rows.

        `index`: of the MoE layer, among those.
        """
        ops.add_routed_experts(
            out,
            hidden,
            topk_ids,
            topk_weights,
            addresses,
            self.layout,
            activation=self.activation,
            weight_on_input=self.weight_on_input,
            span=span,
            biases=self.biases[index] if self.biases else None,
        )
