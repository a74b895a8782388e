"""Knows every op of this package: schema, shape function, and which backend computes it.

Legend: T tokens, k choices a token, E experts of a layer, H hidden, O out, I in features.

`torch.ops.moecli.*` take flat tensors; `linear` and `routed_experts` are their typed faces.
Backends: "reference" expands whole weights to fp32; "torch" expands tiles that stay in cache and
differs from it by at most 1e-5 of the largest output.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import QuantError
from quant.kernels import reference, tiled
from quant.layout import ExpertLayout, ExpertWeights
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight


@dataclass(frozen=True)
class Backend:
    """How the ops are computed on the CPU; everything but weights is fp32 here."""

    linear_quantized: Callable[[Tensor, QuantizedWeight], Tensor]  # [T, I] -> [T, O]
    linear_float: Callable[[Tensor, Tensor], Tensor]  # [T, I], [O, I] -> [T, O]


BACKENDS = {
    "reference": Backend(reference.linear_quantized, reference.linear_float),
    "torch": Backend(tiled.linear_quantized, tiled.linear_float),
}
_ACTIVATIONS = {"silu": torch.nn.functional.silu}
_backend = "torch"


def set_backend(name: str) -> None:
    """Choose who computes from now on, in every thread."""
    global _backend
    if name not in BACKENDS:
        raise QuantError(f"no kernels are called `{name}`", f"use one of {', '.join(BACKENDS)}")
    _backend = name


def current_backend() -> str:
    return _backend


def linear(x: Tensor, weight: QuantizedWeight | Tensor) -> Tensor:
    """x [..., I] by a weight [O, I], quantized or of any float dtype -> [..., O] in x's dtype."""
    if isinstance(weight, QuantizedWeight):
        scheme = weight.scheme
        result: Tensor = torch.ops.moecli.linear_quantized(
            x, weight.packed, weight.scale, scheme.bits, scheme.group_size
        )
        return result
    return torch.ops.moecli.linear_float(x, weight)


def routed_experts(
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E]: where each expert's bytes lie; 0: not here now
    layout: ExpertLayout,
    *,
    activation: str = "silu",
    weight_on_input: bool = False,
) -> Tensor:
    """What each choice contributes: fp32 [T, k, H], exact zeros where the expert is not here.

    A contribution is weight * Expert(x), or Expert(weight * x) with `weight_on_input`. It depends
    on the tokens that chose this expert and on nothing else, so experts can be done in several
    waves, and the sum over k of all waves is bitwise that of one.

    The memory behind `addresses` must hold `layout.nbytes` bytes and stay as it is meanwhile.
    """
    scheme = layout.scheme
    result: Tensor = torch.ops.moecli.routed_experts(
        hidden,
        topk_ids,
        topk_weights,
        addresses,
        layout.intermediate_size,
        scheme.bits,
        scheme.group_size,
        activation,
        weight_on_input,
    )
    return result


def _linear_quantized(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    weight = QuantizedWeight(packed, scale, QuantScheme(bits, group))
    flat = x.reshape(-1, weight.in_features).float()  # [T, I]
    out = BACKENDS[_backend].linear_quantized(flat, weight)
    return out.to(x.dtype).view(*x.shape[:-1], weight.out_features)


def _linear_quantized_shape(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _linear_float(x: Tensor, weight: Tensor) -> Tensor:
    flat = x.reshape(-1, weight.shape[1]).float()  # [T, I]
    out = BACKENDS[_backend].linear_float(flat, weight)
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _linear_float_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _routed_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    addresses: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    weight_on_input: bool,
) -> Tensor:
    num_tokens, hidden_size = hidden.shape
    num_choices = topk_ids.shape[1]
    layout = ExpertLayout(hidden_size, intermediate_size, QuantScheme(bits, group_size))
    x = hidden.float()  # [T, H]
    weights = topk_weights.float().reshape(-1, 1)  # [T * k, 1]
    out = x.new_zeros(num_tokens * num_choices, hidden_size)  # [T * k, H]
    where = addresses.tolist()
    for expert, positions in _by_expert(topk_ids.flatten().tolist(), len(where)).items():
        if where[expert] == 0:
            continue
        chosen = torch.tensor(positions)  # [n], which of T * k
        rows, row_weights = x[chosen // num_choices], weights[chosen]  # [n, H], [n, 1]
        expert_weights = layout.views(_memory(where[expert], layout.nbytes))
        if weight_on_input:
            result = _expert(rows * row_weights, expert_weights, activation)
        else:
            result = _expert(rows, expert_weights, activation).mul_(row_weights)
        out[chosen] = result
    return out.view(num_tokens, num_choices, hidden_size)


def _routed_experts_shape(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    addresses: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    weight_on_input: bool,
) -> Tensor:
    shape = (hidden.shape[0], topk_ids.shape[1], hidden.shape[1])
    return hidden.new_empty(shape, dtype=torch.float32)


def _expert(x: Tensor, weights: ExpertWeights, activation: str) -> Tensor:
    """x fp32 [n, H] -> fp32 [n, H]"""
    multiply = BACKENDS[_backend].linear_quantized
    gate, up = multiply(x, weights.gate), multiply(x, weights.up)  # [n, intermediate]
    return multiply(_ACTIVATIONS[activation](gate).mul_(up), weights.down)


def _by_expert(ids: list[int], num_experts: int) -> dict[int, list[int]]:
    """Expert -> which of the T * k choices name it."""
    chosen: dict[int, list[int]] = {}
    for position, expert in enumerate(ids):
        assert 0 <= expert < num_experts, f"expert {expert} of {num_experts} was chosen"
        chosen.setdefault(expert, []).append(position)
    return chosen


def _memory(address: int, nbytes: int) -> Tensor:
    """The bytes at an address as uint8 [nbytes], not copied."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


_OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear_quantized(Tensor x, Tensor packed, Tensor scale, int bits, int group_size) -> Tensor": (
        _linear_quantized,
        _linear_quantized_shape,
    ),
    "linear_float(Tensor x, Tensor weight) -> Tensor": (_linear_float, _linear_float_shape),
    "routed_experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor addresses, "
    "int intermediate_size, int bits, int group_size, str activation, bool weight_on_input) "
    "-> Tensor": (_routed_experts, _routed_experts_shape),
}
_library = torch.library.Library("moecli", "DEF")
for _schema, (_compute, _shape) in _OPS.items():
    _name = _library.define(_schema)
    _library.impl(_name, _compute, "CPU")
    torch.library.register_fake(f"moecli::{_name}", _shape, lib=_library)
