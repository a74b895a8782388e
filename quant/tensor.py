"""Knows what a quantized weight consists of; knows neither how it was made nor where it lies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of one Linear, [O, I]: value[o, i] = q[o, i] * scale[o, i // group_size]."""

    packed: Tensor  # int32 [O, I * bits / 32]
    scale: Tensor  # bf16 [O, I / group_size]; a scale may be negative
    scheme: QuantScheme

    def __post_init__(self) -> None:
        assert self.packed.dtype == torch.int32, f"packed words are {self.packed.dtype}"
        assert self.scale.dtype == torch.bfloat16, f"scales are {self.scale.dtype}"
        shape = (self.out_features, self.in_features)
        assert tuple(self.packed.shape) == self.scheme.packed_shape(*shape), (
            f"packed {tuple(self.packed.shape)} and scale {tuple(self.scale.shape)} disagree"
        )

    @property
    def out_features(self) -> int:
        return self.scale.shape[0]

    @property
    def in_features(self) -> int:
        return self.scale.shape[1] * self.scheme.group_size

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on `device`; itself where it lies there already."""
        packed, scale = self.packed.to(device), self.scale.to(device)
        if packed is self.packed and scale is self.scale:
            return self
        return QuantizedWeight(packed, scale, self.scheme)
