"""Knows experts whose activation is a function of Python: computed one by one, product by product.

Legend: T tokens, k choices a token, n tokens of one expert, H hidden, I intermediate, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.kernels.experts import memory_at
from quant.layout import ExpertLayout
from quant.ops import linear, linears

Gate = Callable[[Tensor], Tensor]  # gate and up, [n, 2 I] -> [n, I]


def gated_experts(
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E]; 0: not here now
    layout: ExpertLayout,
    gate: Gate,
) -> Tensor:
    """fp32 [T, k, H], what `quant.ops.routed_experts` gives, with `gate` between the products."""
    out = torch.zeros(*topk_ids.shape, hidden.shape[-1])  # [T, k, H]
    for expert in topk_ids.unique().tolist():
        address = int(addresses[expert])
        if address == 0:
            continue
        tokens, choices = torch.where(topk_ids == expert)  # [n] each
        weights = layout.views(memory_at(address, layout.nbytes, hidden.device))
        inner = gate(torch.cat(linears(hidden[tokens], [weights.gate, weights.up]), dim=-1))
        contribution = linear(inner, weights.down).float()  # [n, H]
        out[tokens, choices] = contribution * topk_weights[tokens, choices, None]
    return out
