"""Knows the ops as plainly as they can be said, in fp32: what every faster kernel is held to.

Legend: T tokens, O out, I in features.
"""

from torch import Tensor

from quant.quantize import dequantize
from quant.tensor import QuantizedWeight


def linear_quantized(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x fp32 [T, I] -> fp32 [T, O]"""
    return x @ dequantize(weight).t()


def linear_float(x: Tensor, weight: Tensor) -> Tensor:
    """x fp32 [T, I], weight [O, I] of any float dtype -> fp32 [T, O]"""
    return x @ weight.float().t()
