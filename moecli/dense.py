"""Knows which dense weights are requantized for a run, and to what; knows no files."""

from collections.abc import Callable

import torch
from torch import Tensor

from moecli.models.config import ModelSpec
from quant.bnb import BnbScheme, BnbWeight, bnb_nbytes
from quant.tensor import QuantizedWeight

DenseWeight = QuantizedWeight | BnbWeight | Tensor


def bnb_linears(
    spec: ModelSpec,
    weights: Callable[[str], QuantizedWeight | Tensor],
    scheme: BnbScheme,
    device: torch.device | str,
) -> Callable[[str], DenseWeight]:
    """A Decoder's `weights` whose linears come in a scheme of bitsandbytes, on `device`.

    Attention, dense MLPs, shared experts and an untied head are quantized anew, from whatever
    `weights` gives; routers, norms, biases and embeddings come as it gives them. A linear takes
    some 32 MiB of the device while it is made, besides itself.
    """
    linears = {tensor.name for tensor in spec.dense_tensors if tensor.linear}

    def requantized(name: str) -> DenseWeight:
        weight = weights(name)
        return BnbWeight.of(weight, scheme, device) if name in linears else weight

    return requantized


def bnb_dense_nbytes(spec: ModelSpec, scheme: BnbScheme) -> int:
    """Bytes of all linears that `bnb_linears` quantizes."""
    return sum(
        bnb_nbytes(scheme, tensor.shape[0], tensor.shape[1])
        for tensor in spec.dense_tensors
        if tensor.linear
    )
