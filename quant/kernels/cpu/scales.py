"""Knows the search for scales as a call of the compiled kernels; not how it goes about it.

Legend: O out, I in features; g group size; G = I / g groups a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.cpu.library import Library, SearchArgument
from quant.scheme import QuantScheme

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `FloatType` of src/types.h


@dataclass(frozen=True)
class Found:
    """Integers and scales; of each group its extreme, and in units of that, squared: the squared
    error and the sum of squares.
    """

    packed: Tensor  # int32 [O, I * bits / 32]
    scale: Tensor  # bf16 [O, G]
    errors: Tensor  # fp32 [O, G]
    squares: Tensor  # fp32 [O, G]
    extremes: Tensor  # fp32 [O, G]


def search_scales(
    library: Library,
    weight: Tensor,
    scheme: QuantScheme,
    quotients: Sequence[float],
    steps: range,
) -> Found | None:
    """The best scale of each group of a weight [O, I]; None where one is not finite, or too large.

    Tried are extreme / quotient for all quotients, and the neighbours in bf16, `steps` away, of
    extreme / lowest code. Threads are as many as torch has.
    """
    floats = (weight if weight.dtype in _FLOATS else weight.float()).contiguous()
    out_features, in_features = floats.shape
    shape = scheme.scale_shape(out_features, in_features)
    found = Found(
        torch.empty(scheme.packed_shape(out_features, in_features), dtype=torch.int32),
        torch.empty(shape, dtype=torch.bfloat16),
        *(torch.empty(shape) for _ in range(3)),
    )
    tried = torch.tensor(quotients)
    search = SearchArgument(
        weight=floats.data_ptr(),
        type=_FLOATS[floats.dtype],
        groups=found.scale.numel(),
        bits=scheme.bits,
        group=scheme.group_size,
        quotients=tried.data_ptr(),
        count=len(tried),
        first_step=steps.start,
        end_step=steps.stop,
        packed=found.packed.data_ptr(),
        scale=found.scale.data_ptr(),
        errors=found.errors.data_ptr(),
        squares=found.squares.data_ptr(),
        extremes=found.extremes.data_ptr(),
    )
    fine = library.search_scales(search, torch.get_num_threads())
    return found if fine else None
