"""Knows every op of this package: schema, shape function, and which backend computes it.

Legend: T tokens, k choices a token, E experts of a layer, H hidden, O out, I in features, and of
experts intermediate rows.

`torch.ops.moecli.*` take flat tensors; the functions here are their typed faces. Backends:
"reference" expands whole weights to fp32; "torch" expands tiles that stay in cache and differs
from it by at most 1e-5 of the largest output; "cpu" is compiled kernels for the processor, which
quantize activations to 8 bits on the fly (0.5% of a product); "triton" is kernels for CUDA, or for
the CPU in Triton's interpreter. "auto" is "triton" for tensors on CUDA and "cpu" for all others, or
"torch" where "cpu" is not compiled: `fallback` says so.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.bnb import BnbWeight
from quant.errors import QuantError
from quant.kernels import reference, tiled
from quant.kernels.cpu.backend import CpuBackend
from quant.kernels.cpu.library import Library, NoLibrary
from quant.kernels.experts import ACTIVATIONS, TorchBackend
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

Span = tuple[int, int]  # intermediate rows begin..end-1


class Backend(Protocol):
    """Who computes: two products that keep x's dtype, and routed experts, which are fp32."""

    def linear_quantized(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """x [T, I] -> [T, O]"""

    def linears_quantized(self, x: Tensor, weights: Sequence[QuantizedWeight]) -> list[Tensor]:
        """x [T, I] by weights of one scheme -> [T, O] each"""

    def linear_float(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, I], weight [O, I] -> [T, O]"""

    def routed_experts(
        self,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        addresses: Tensor,
        layout: ExpertLayout,
        *,
        activation: str,
        weight_on_input: bool,
        span: Span,
        biases: Tensor | None = None,
    ) -> Tensor: ...

    def add_routed_experts(
        self,
        out: Tensor,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        addresses: Tensor,
        layout: ExpertLayout,
        *,
        activation: str,
        weight_on_input: bool,
        span: Span,
        biases: Tensor | None = None,
    ) -> None: ...

    def add_contributions(self, out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
        """out fp32 [T, H] += the sum over k of contributions [T, k, H]"""


BACKENDS = ("auto", "reference", "torch", "cpu", "triton")
_TORCH_BACKENDS = {
    "reference": TorchBackend(reference.linear_quantized, reference.linear_float),
    "torch": TorchBackend(tiled.linear_quantized, tiled.linear_float),
}
_chosen = "auto"


def set_backend(name: str) -> None:
    """Choose who computes from now on, in every thread. Raises QuantError where it cannot."""
    global _chosen
    if name not in BACKENDS:
        raise QuantError(f"no kernels are called `{name}`", f"use one of {', '.join(BACKENDS)}")
    if name == "triton":
        _triton_backend()
    if name == "cpu":
        _cpu_backend()
    _chosen = name


def current_backend() -> str:
    return _chosen


def fallback() -> NoLibrary | None:
    """Why "auto" is slow on the processor: the kernels for it are missing; None: it is not."""
    try:
        _cpu_backend()
    except NoLibrary as missing:
        return missing
    return None


def compiled() -> Library | None:
    """The kernels for the processor, if these compute there now."""
    if _chosen == "cpu" or (_chosen == "auto" and _auto_cpu() == "cpu"):
        return _cpu_backend().library
    return None


def cpu_isa() -> str:
    """Which instructions "cpu" uses. Raises QuantError where it cannot compute."""
    return _cpu_backend().isa


def linear(x: Tensor, weight: QuantizedWeight | BnbWeight | Tensor) -> Tensor:
    """x [..., I] by a weight [O, I], quantized or of any float dtype -> [..., O] in x's dtype."""
    if isinstance(weight, BnbWeight):
        return weight.linear(x)
    if isinstance(weight, QuantizedWeight):
        scheme = weight.scheme
        result: Tensor = torch.ops.moecli.linear_quantized(
            x, weight.packed, weight.scale, scheme.bits, scheme.group_size
        )
        return result
    return torch.ops.moecli.linear_float(x, weight)


def linears(x: Tensor, weights: Sequence[QuantizedWeight | BnbWeight | Tensor]) -> list[Tensor]:
    """`linear` of one x by several weights; where they share a scheme, in one call."""
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        scheme = first.scheme
        if len(quantized) == len(weights) and all(w.scheme == scheme for w in quantized):
            packed, scales = [w.packed for w in quantized], [w.scale for w in quantized]
            results: list[Tensor] = torch.ops.moecli.linears_quantized(
                x, packed, scales, scheme.bits, scheme.group_size
            )
            return results
    return [linear(x, weight) for weight in weights]


def routed_experts(
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E]: where each expert's bytes lie; 0: not here now
    layout: ExpertLayout,
    *,
    activation: str = "silu",
    weight_on_input: bool = False,
    span: Span | None = None,
    biases: Tensor | None = None,  # fp32 [E, 2 I + H]: of gate, up and down
) -> Tensor:
    """What each choice contributes: fp32 [T, k, H], exact zeros where the expert is not here.

    A contribution is weight * Expert(x), or Expert(weight * x) with `weight_on_input`. It depends
    on the tokens that chose this expert and on nothing else, so experts can be done in several
    waves, and the sum over k of all waves is bitwise that of one. With `span` only intermediate
    rows begin..end-1 contribute, whole groups; spans that make up the whole add up to it.

    The memory behind `addresses` must hold `layout.nbytes` bytes, laid out as the whole expert
    whatever the span is, and stay as it is meanwhile. Of rows outside the span nothing is used.
    The bias of down contributes with the span that begins at 0. Where the layout is that of the
    first rows of experts (`ExpertLayout.restricted`), biases may be those of the whole ones.
    """
    result: Tensor = torch.ops.moecli.routed_experts(
        *(hidden, topk_ids, topk_weights, addresses, biases),
        *_flat(layout, activation, weight_on_input, span),
    )
    return result


def add_routed_experts(
    out: Tensor,  # fp32 [T, H], contiguous
    hidden: Tensor,  # [T, H]
    topk_ids: Tensor,  # int64 [T, k]
    topk_weights: Tensor,  # [T, k]
    addresses: Tensor,  # int64 [E]; 0: contributes nothing
    layout: ExpertLayout,
    *,
    activation: str = "silu",
    weight_on_input: bool = False,
    span: Span | None = None,
    biases: Tensor | None = None,  # fp32 [E, 2 I + H]
) -> None:
    """out += the sum over k of `routed_experts`, in an order that depends on shapes alone.

    Kernels neither wait for the host nor ask it anything, and read 16 bytes at once: addresses
    are multiples of 16. Otherwise what `routed_experts` says of them holds.
    """
    torch.ops.moecli.add_routed_experts(
        *(out, hidden, topk_ids, topk_weights, addresses, biases),
        *_flat(layout, activation, weight_on_input, span),
    )


def add_contributions(out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
    """out fp32 [T, H] += the sum over k of contributions [T, k, H] of `routed_experts`.

    Summed in the order of `add_routed_experts`, so that the two ways are bitwise the same.
    """
    torch.ops.moecli.add_contributions(out, contributions, topk_ids)


def _flat(
    layout: ExpertLayout, activation: str, weight_on_input: bool, span: Span | None
) -> tuple[int | str | bool, ...]:
    """What the ops want to know beside tensors."""
    assert activation in ACTIVATIONS, f"unknown activation {activation}"
    begin, end = (0, layout.intermediate_size) if span is None else span
    layout.check_span(begin, end)
    scheme = layout.scheme
    return (
        *(layout.intermediate_size, scheme.bits, scheme.group_size),
        *(activation, weight_on_input, begin, end),
    )


def _backend(x: Tensor) -> Backend:
    """Who computes on the device of `x`."""
    name = _chosen
    if name == "auto":
        name = "triton" if x.is_cuda else _auto_cpu()
    if name == "cpu":
        if x.device.type != "cpu":
            raise QuantError(
                f"the kernels `cpu` cannot compute on {x.device.type}", "use `--kernels auto`"
            )
        return _cpu_backend()
    if name != "triton":
        return _TORCH_BACKENDS[name]
    backend, interpreted = _triton_backend()
    if not x.is_cuda and not interpreted:
        raise QuantError(
            f"the kernels `triton` cannot compute on {x.device.type}",
            "use `--kernels auto`, or set TRITON_INTERPRET=1 to try them without a GPU, slowly",
        )
    return backend


@functools.cache
def _cpu_backend() -> CpuBackend:
    return CpuBackend()


@functools.cache
def _auto_cpu() -> str:
    return "torch" if fallback() else "cpu"


@functools.cache
def _triton_backend() -> tuple[Backend, bool]:
    """The backend, and whether Triton's interpreter runs it."""
    try:
        import triton
    except ImportError as error:
        raise QuantError(
            "the kernels `triton` need the package `triton`, which is not installed",
            "install it, or use `--kernels torch`",
        ) from error
    from quant.kernels.triton import TritonBackend

    return TritonBackend(), triton.knobs.runtime.interpret


def _linear_quantized(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    weight = QuantizedWeight(packed, scale, QuantScheme(bits, group))
    out = _backend(x).linear_quantized(x.reshape(-1, weight.in_features), weight)
    return out.view(*x.shape[:-1], weight.out_features)


def _linear_quantized_shape(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _linears_quantized(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], bits: int, group: int
) -> list[Tensor]:
    scheme = QuantScheme(bits, group)
    weights = [QuantizedWeight(*pair, scheme) for pair in zip(packed, scales, strict=True)]
    outs = _backend(x).linears_quantized(x.reshape(-1, weights[0].in_features), weights)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def _linears_quantized_shape(
    x: Tensor, packed: list[Tensor], scales: list[Tensor], bits: int, group: int
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], scale.shape[0]) for scale in scales]


def _linear_float(x: Tensor, weight: Tensor) -> Tensor:
    out = _backend(x).linear_float(x.reshape(-1, weight.shape[1]), weight)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear_float_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _routed_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    addresses: Tensor,
    biases: Tensor | None,
    *flat: Any,
) -> Tensor:
    layout, options = _typed(hidden.shape[1], *flat)
    _check_biases(biases, addresses, layout)
    return _backend(hidden).routed_experts(
        hidden, topk_ids, topk_weights, addresses, layout, **options, biases=biases
    )


def _routed_experts_shape(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, addresses: Tensor, *rest: Any
) -> Tensor:
    shape = (hidden.shape[0], topk_ids.shape[1], hidden.shape[1])
    return hidden.new_empty(shape, dtype=torch.float32)


def _add_routed_experts(
    out: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    addresses: Tensor,
    biases: Tensor | None,
    *flat: Any,
) -> None:
    _check_out(out, hidden)
    layout, options = _typed(hidden.shape[1], *flat)
    _check_biases(biases, addresses, layout)
    _backend(hidden).add_routed_experts(
        out, hidden, topk_ids, topk_weights, addresses, layout, **options, biases=biases
    )


def _add_routed_experts_shape(
    out: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    addresses: Tensor,
    *rest: Any,
) -> None:
    _check_out(out, hidden)


def _add_contributions(out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
    _check_out(out, contributions[:, 0])
    _backend(out).add_contributions(out, contributions, topk_ids)


def _add_contributions_shape(out: Tensor, contributions: Tensor, topk_ids: Tensor) -> None:
    _check_out(out, contributions[:, 0])


def _check_biases(biases: Tensor | None, addresses: Tensor, layout: ExpertLayout) -> None:
    if biases is None:
        return
    least = 2 * layout.intermediate_size + layout.hidden_size
    rows, columns = biases.shape
    fitting = rows == addresses.numel() and columns >= least and (columns - least) % 2 == 0
    assert fitting, f"biases {rows, columns}, not {addresses.numel(), least}"
    assert biases.dtype == torch.float32, f"biases of {biases.dtype}"
    assert biases.is_contiguous(), "biases with gaps"


def _check_out(out: Tensor, hidden: Tensor) -> None:
    assert out.dtype == torch.float32, f"sums of experts are fp32, not {out.dtype}"
    assert out.is_contiguous(), "sums of experts are contiguous"
    assert out.shape == hidden.shape, f"out is {tuple(out.shape)}, hidden {tuple(hidden.shape)}"


@functools.cache
def _layout(hidden_size: int, intermediate_size: int, bits: int, group_size: int) -> ExpertLayout:
    """One for all layers of a model: checking it takes longer than a call should."""
    return ExpertLayout(hidden_size, intermediate_size, QuantScheme(bits, group_size))


def _typed(
    hidden_size: int,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    weight_on_input: bool,
    begin: int,
    end: int,
) -> tuple[ExpertLayout, dict[str, Any]]:
    """What `_flat` has flattened: the layout, and the arguments by keyword."""
    layout = _layout(hidden_size, intermediate_size, bits, group_size)
    layout.check_span(begin, end)
    options = {
        "activation": activation,
        "weight_on_input": weight_on_input,
        "span": (begin, end),
    }
    return layout, options


_CHOICES = (
    "Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor addresses, Tensor? biases, "
    "int intermediate_size, int bits, int group_size, str activation, bool weight_on_input, "
    "int begin, int end"
)
_Result = Tensor | list[Tensor] | None
_OPS: dict[str, tuple[Callable[..., _Result], Callable[..., _Result]]] = {
    "linear_quantized(Tensor x, Tensor packed, Tensor scale, int bits, int group_size) -> Tensor": (
        _linear_quantized,
        _linear_quantized_shape,
    ),
    "linears_quantized(Tensor x, Tensor[] packed, Tensor[] scales, int bits, int group_size) "
    "-> Tensor[]": (_linears_quantized, _linears_quantized_shape),
    "linear_float(Tensor x, Tensor weight) -> Tensor": (_linear_float, _linear_float_shape),
    f"routed_experts({_CHOICES}) -> Tensor": (_routed_experts, _routed_experts_shape),
    f"add_routed_experts(Tensor(a!) out, {_CHOICES}) -> ()": (
        _add_routed_experts,
        _add_routed_experts_shape,
    ),
    "add_contributions(Tensor(a!) out, Tensor contributions, Tensor topk_ids) -> ()": (
        _add_contributions,
        _add_contributions_shape,
    ),
}
_library = torch.library.Library("moecli", "DEF")
for _schema, (_compute, _shape) in _OPS.items():
    _name = _library.define(_schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _compute, _key)
    torch.library.register_fake(f"moecli::{_name}", _shape, lib=_library)
