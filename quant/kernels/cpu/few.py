"""Knows what the compiled calls for few tokens take, and how weights become that.

Legend: T tokens, at most MOST_TOKENS, O out, I in features.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.kernels.cpu.library import MatrixArgument
from quant.tensor import QuantizedWeight

MOST_TOKENS = 8  # `kMostTokens` of src/few_product.h
QUANTIZED = -1
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `FloatType` of src/types.h
KEPT = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `KeptType`
ROPES = {"none": 0, "interleaved": 1, "half": 2}  # `Rope`
# `RouterKind` of src/router.h
ROUTERS = {"softmax": 0, "sigmoid": 1, "softmax_of_chosen": 2, "grouped": 3}
ACTIVATIONS = {"silu": 0, "clamped_swiglu": 1}  # `Activation`
NORMS = {"none": 0, "before": 1, "after": 2}  # `HeadNorm` of src/layer.h


class WeightArgument(ctypes.Structure):
    """`Weight` of src/few_product.h; the tensors it points to must outlive it."""

    _fields_ = (
        *(("matrix", MatrixArgument), ("rows", ctypes.c_int64)),
        *(("type", ctypes.c_int), ("bias", ctypes.c_void_p)),
    )


class RouterArgument(ctypes.Structure):
    """`Router` of src/router.h."""

    _fields_ = (
        *(("weight", WeightArgument), ("top_k", ctypes.c_int64)),
        *(("kind", ctypes.c_int), ("normalize", ctypes.c_bool)),
        *(("correction", ctypes.c_void_p), ("groups", ctypes.c_int64)),
        *(("best_groups", ctypes.c_int64), ("scale", ctypes.c_float)),
    )


class PlaceArgument(ctypes.Structure):
    """`Place` of src/layer.h."""

    _fields_ = (
        *(("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)),
        *(("key_scales", ctypes.c_void_p), ("value_scales", ctypes.c_void_p)),
        *(("head_stride", ctypes.c_int64), ("scale_stride", ctypes.c_int64)),
        *(("ring", ctypes.c_int64), ("type", ctypes.c_int), ("window", ctypes.c_bool)),
    )


class LayerArgument(ctypes.Structure):
    """`LayerCall` of src/layer.h."""

    _fields_ = (
        *(("index", ctypes.c_int64), ("hidden_size", ctypes.c_int64)),
        *(("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64), ("head_size", ctypes.c_int64)),
        *(("turned", ctypes.c_int64), ("rope", ctypes.c_int), ("norm", ctypes.c_int)),
        *(("tempered", ctypes.c_bool), ("eps", ctypes.c_float)),
        *((name, ctypes.c_void_p) for name in ("input_norm", "head_norm", "sinks", "post_norm")),
        *((name, WeightArgument) for name in ("q", "k", "v", "o")),
        *(("router", RouterArgument), ("guess", RouterArgument)),
        ("guess_norm", ctypes.c_void_p),
    )


class StepArgument(ctypes.Structure):
    """`StepCall` of src/layer.h."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("positions", "turns", "temperature", "places")),
        *((name, ctypes.c_void_p) for name in ("hidden", "normed", "delta")),
        *((name, ctypes.c_void_p) for name in ("ids", "weights", "guesses")),
        *(("row_count", ctypes.c_int64), ("rows", ctypes.c_void_p), ("logits", ctypes.c_void_p)),
    )


class MlpArgument(ctypes.Structure):
    """`MlpCall` of src/layer.h."""

    _fields_ = (
        *((name, WeightArgument) for name in ("gate", "up", "down")),
        ("activation", ctypes.c_int),
    )


class ResidentsArgument(ctypes.Structure):
    """`Residents` of src/step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("addresses", "asked", "hits")),
        *(("experts", ctypes.c_int64), ("intermediate", ctypes.c_int64)),
        *(("bits", ctypes.c_int), ("group", ctypes.c_int)),
        *(("activation", ctypes.c_int), ("weight_on_input", ctypes.c_bool)),
        ("biases", ctypes.c_void_p),
    )


class BlockArgument(ctypes.Structure):
    """`Block` of src/step.h."""

    _fields_ = (
        *(("layer", LayerArgument), ("mlp", MlpArgument), ("experts", ResidentsArgument)),
        ("whole", ctypes.c_bool),
    )


class DecoderArgument(ctypes.Structure):
    """`DecoderCall` of src/step.h."""

    _fields_ = (
        *(("count", ctypes.c_int64), ("blocks", ctypes.c_void_p)),
        *(("norm", ctypes.c_void_p), ("eps", ctypes.c_float), ("head", WeightArgument)),
    )


def weight_argument(weight: Any, bias: Tensor | None = None) -> WeightArgument | None:
    """A weight [O, I] and its bias [O] fp32; None where it is of a kind these calls cannot read."""
    at = None if bias is None else bias.data_ptr()
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()), "an odd bias"
    if isinstance(weight, QuantizedWeight):
        return WeightArgument(matrix_argument(weight), weight.out_features, QUANTIZED, at)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or not weight.is_contiguous():
        return None
    rows, in_features = weight.shape
    matrix = MatrixArgument(packed=weight.data_ptr(), in_features=in_features)
    return WeightArgument(matrix, rows, FLOATS[weight.dtype], at)


def matrix_argument(weight: QuantizedWeight) -> MatrixArgument:
    """The bytes of a quantized weight."""
    packed, scale = weight.packed, weight.scale
    assert packed.stride(1) == scale.stride(1) == 1, "the values of a row follow each other"
    return MatrixArgument(
        *(packed.data_ptr(), scale.data_ptr(), packed.stride(0) * 4, scale.stride(0) * 2),
        *(weight.in_features, weight.scheme.bits, weight.scheme.group_size),
    )


def share_input(weights: Sequence[WeightArgument]) -> bool:
    """Whether one form of their input serves them all: floats, or codes for as many bits."""
    return len({(w.type == QUANTIZED, w.matrix.bits) for w in weights}) == 1
