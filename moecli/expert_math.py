"""Knows how a model computes experts from their bytes; not where those lie, nor on which device.

Legend: T tokens, k choices a token, H hidden, E experts of a layer.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

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
    """How this model computes an expert from its bytes."""

    layout: ExpertLayout
    weight_on_input: bool

    def add(
        self,
        out: Tensor,  # fp32 [T, H]
        hidden: Tensor,  # [T, H]
        topk_ids: Tensor,  # [T, k]
        topk_weights: Tensor,  # [T, k]
        addresses: Tensor,  # int64 [E]
        span: Span | None = None,
    ) -> None:
        """out += what the experts with an address contribute, or `span` of their inner rows."""
        ops.add_routed_experts(
            out,
            hidden,
            topk_ids,
            topk_weights,
            addresses,
            self.layout,
            weight_on_input=self.weight_on_input,
            span=span,
        )
