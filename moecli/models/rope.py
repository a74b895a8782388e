"""Knows how fast RoPE turns each pair of components, scaled or not; no positions, no heads."""

import math

import torch
from torch import Tensor

from moecli.models.config import RopeScaling, RopeSpec, YarnScaling


def inverse_frequencies(rope: RopeSpec, size: int) -> Tensor:
    """Radians a position turns each pair of the `size` components that turn, [size / 2] fp32."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / rope.theta**exponents
    if isinstance(rope.scaling, YarnScaling):
        return _yarn(frequencies, rope.theta, rope.scaling)
    return frequencies if rope.scaling is None else _llama3(frequencies, rope.scaling)


def magnitude(rope: RopeSpec) -> float:
    """By what RoPE multiplies queries and keys besides turning them."""
    return rope.scaling.magnitude if isinstance(rope.scaling, YarnScaling) else 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)  # in the original context
    slow = frequencies / scaling.factor
    if scaling.high == scaling.low:  # the blend in between is 0/0, and empty
        return torch.where(turns < scaling.low, slow, frequencies)
    blend = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return slow + blend * (frequencies - slow)


def _yarn(frequencies: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """From `fast` turns in the original context on a pair keeps its speed, below `slow` none does.

    In between the blend is linear in the number of the pair, not in its speed.
    """
    size = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_context / (2 * math.pi * times)
        return size * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
    if scaling.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001  # a step, where both are one pair
    blend = ((torch.arange(len(frequencies)) - first) / width).clamp(0, 1)
    return frequencies / scaling.factor * blend + frequencies * (1 - blend)
