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
    """Integers and scales; of each row its squared error and its sum of squares."""

    packed: Tensor  # int32 [O, I * bits / 32]
    scale: Tensor  # bf16 [O, G]
    row_errors: Tensor  # fp64 [O]
    row_squares: Tensor  # fp64 [O]


def search_scales(
    library: Library,
    weight: Tensor,
    scheme: QuantScheme,
    factors: Sequence[int],
    steps: range,
) -> Found | None:
    """The best scale of each group of a weight [O, I]; None where one is not finite, or too large.

    Tried are, at 4 bits, -extreme / scale of all `factors` / 2048, and at 8 bits the neighbours in
    bf16, `steps` away, of extreme / -128. Threads are as many as torch has.
    """
    floats = (weight if weight.dtype in _FLOATS else weight.float()).contiguous()
    out_features, in_features = floats.shape
    shape = scheme.scale_shape(out_features, in_features)
    found = Found(
        torch.empty(scheme.packed_shape(out_features, in_features), dtype=torch.int32),
        torch.empty(shape, dtype=torch.bfloat16),
        *(torch.empty(out_features, dtype=torch.float64) for _ in range(2)),
    )
    tried = torch.tensor(factors, dtype=torch.int32)
    search = SearchArgument(
        weight=floats.data_ptr(),
        type=_FLOATS[floats.dtype],
        rows=out_features,
        row_groups=shape[1],
        bits=scheme.bits,
        group=scheme.group_size,
        factors=tried.data_ptr(),
        count=len(tried),
        first_step=steps.start,
        end_step=steps.stop,
        packed=found.packed.data_ptr(),
        scale=found.scale.data_ptr(),
        row_errors=found.row_errors.data_ptr(),
        row_squares=found.row_squares.data_ptr(),
    )
    fine = library.search_scales(search, torch.get_num_threads())
    return found if fine else None
