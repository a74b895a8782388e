"""Knows what moecli puts into a model of the library: its experts, and weights as they are stored.

Legend: T tokens, H hidden, k experts a token, O out, I in features, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moecli.models.provider import ExpertProvider
from quant.ops import linear
from quant.quantize import dequantize
from quant.tensor import QuantizedWeight


class RoutedExperts(nn.Module):
    """Stands where the library has the experts of a layer; has no weights of its own."""

    def __init__(self, layer: int, num_experts: int, provider: ExpertProvider) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._layer = layer
        self._provider = provider

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], top_k_index and top_k_weights [T, k] -> [T, H] in hidden's dtype."""
        x = hidden.reshape(-1, hidden.shape[-1]).float()
        weights = top_k_weights.to(x.dtype)
        pending = self._provider.begin(self._layer, x, top_k_index.long(), weights)
        return pending.result().view_as(hidden).to(hidden.dtype)


class StoredLinear(nn.Module):
    """A linear whose weight stays as the file has it: 16 bits, or quantized."""

    def __init__(
        self, weight: QuantizedWeight | Tensor, bias: Tensor | None, in_features: int
    ) -> None:
        super().__init__()
        self._stored = weight  # [O, I]
        self.bias = bias  # fp32 [O]
        self.in_features = in_features
        self.out_features = weight.shape[0] if isinstance(weight, Tensor) else weight.out_features

    @property
    def weight(self) -> Tensor:
        """[O, I]; some modules multiply by it themselves. Expanded anew each time if quantized."""
        if isinstance(self._stored, QuantizedWeight):
            return dequantize(self._stored)
        return self._stored.float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]"""
        out = linear(x, self._stored)
        return out if self.bias is None else out + self.bias


class StoredEmbedding(nn.Module):
    """A table of 16 bits whose rows come as fp32."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self._table = table  # [V, H]

    @property
    def weight(self) -> Tensor:
        return self._table

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [...] -> fp32 [..., H]"""
        return F.embedding(token_ids, self._table).float()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` has a module called `name`."""
    parent, _, attribute = name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(attribute)] = module
    else:
        setattr(owner, attribute, module)
