"""Every op, every backend: against an fp64 oracle, by shapes, and alone among absent experts."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quant import ops
from quant.errors import QuantError
from quant.layout import ExpertLayout
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from tests.quant.quant_experts import DEVICES, Experts, assert_close, random

ROOT = Path(__file__).parents[2]
SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = ops.current_backend()
    yield
    ops.set_backend(before)


@pytest.fixture(params=["reference", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    ops.set_backend(request.param)
    return request.param


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 33])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 128), (1300, 384), (33, 9344)])
def test_linear_quantized(
    backend: str, scheme: QuantScheme, num_tokens: int, out_features: int, in_features: int
) -> None:
    weight = quantize(random(out_features, in_features), scheme, "nearest")
    x = random(num_tokens, in_features, seed=1)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    assert_close(ops.linear(x, weight), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 100), (300, 1024)])
def test_linear_float(
    backend: str, dtype: torch.dtype, num_tokens: int, out_features: int, in_features: int
) -> None:
    weight = random(out_features, in_features).to(dtype)
    x = random(num_tokens, in_features, seed=1)
    assert_close(ops.linear(x, weight), x.double() @ weight.double().t())


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 1, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_keeps_leading_dimensions_and_dtype(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weights = (quantize(random(40, 64), QuantScheme()), random(40, 64).bfloat16())
    for weight in weights:
        y = ops.linear(random(*shape).to(dtype), weight)
        assert y.shape == (*shape[:-1], 40)
        assert y.dtype == dtype
    strided = random(64, 6).t()[::2]  # neither contiguous nor dense
    assert_close(
        ops.linear(strided, weights[0]),
        strided.double() @ dequantize(weights[0], torch.float64).t(),
    )


def experts_of(scheme: QuantScheme) -> Experts:
    return Experts(ExpertLayout(128, 256, scheme))


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(8, 128)], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 33])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_routed_experts(
    backend: str,
    scheme: QuantScheme,
    num_tokens: int,
    num_choices: int,
    weight_on_input: bool,
) -> None:
    experts = experts_of(scheme)
    hidden = random(num_tokens, 128)
    ids = random(num_tokens, 5, seed=1).argsort(-1)[:, :num_choices]
    weights = random(num_tokens, num_choices, seed=2).sigmoid()
    y = ops.routed_experts(
        hidden, ids, weights, experts.addresses(), experts.layout, weight_on_input=weight_on_input
    )
    assert y.dtype == torch.float32
    if num_tokens:
        assert_close(y, experts.contributions(hidden, ids, weights, weight_on_input))
    else:
        assert y.shape == (0, num_choices, 128)


def test_an_expert_computes_the_same_whoever_else_is_here(backend: str) -> None:
    experts = experts_of(QuantScheme())
    hidden, ids = random(19, 128), random(19, 5, seed=1).argsort(-1)[:, :3]
    weights = random(19, 3, seed=2).sigmoid()
    whole = ops.routed_experts(hidden, ids, weights, experts.addresses(), experts.layout)
    total = torch.zeros_like(whole)
    for present in ({0}, {3, 1}, {2, 4}):
        part = ops.routed_experts(hidden, ids, weights, experts.addresses(present), experts.layout)
        here = torch.isin(ids, torch.tensor(sorted(present)))
        assert torch.equal(part[here], whole[here])
        assert (part[~here] == 0).all()
        total += part
    assert torch.equal(total, whole)


def test_an_absent_expert_is_never_read(backend: str) -> None:
    experts = experts_of(QuantScheme())
    y = ops.routed_experts(
        random(2, 128), torch.tensor([[0, 1], [4, 2]]), torch.ones(2, 2),
        experts.addresses(set()), experts.layout,
    )  # fmt: skip
    assert y.shape == (2, 2, 128)
    assert (y == 0).all()


@pytest.mark.parametrize("scheme", [QuantScheme(4, 64), QuantScheme(8, 32)], ids=str)
@pytest.mark.parametrize("span", [(0, 64), (64, 192), (192, 256)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_span_contributes_alone_and_adds_to_what_was_there(
    backend: str, scheme: QuantScheme, span: tuple[int, int], device: str
) -> None:
    experts = Experts(ExpertLayout(128, 256, scheme), device=device)
    hidden, ids = random(3, 128).to(device), torch.tensor([[0, 4], [2, 0], [1, 3]], device=device)
    weights, present = random(3, 2, seed=1).sigmoid().to(device), {0, 3, 4}
    call = (hidden, ids, weights, experts.addresses(present), experts.layout)
    exact = experts.contributions(hidden, ids, weights, False, present=present, span=span)
    assert_close(ops.routed_experts(*call, span=span), exact)
    out = random(3, 128, seed=5).to(device)
    before = out.clone()
    ops.add_routed_experts(out, *call, span=span)
    assert torch.equal(out, before + ops.routed_experts(*call, span=span).sum(1))


@pytest.mark.parametrize("span", [(0, 0), (32, 32), (64, 32), (-32, 32), (0, 288), (16, 64)])
def test_a_span_that_is_none_is_our_bug(span: tuple[int, int]) -> None:
    experts = experts_of(QuantScheme())
    with pytest.raises(AssertionError, match=r"is no part of|cuts groups"):
        ops.routed_experts(
            random(1, 128), torch.tensor([[0]]), torch.ones(1, 1), experts.addresses(),
            experts.layout, span=span,
        )  # fmt: skip


def test_sums_have_a_place_that_fits_or_it_is_our_bug() -> None:
    experts = experts_of(QuantScheme())
    call = (random(2, 128), torch.tensor([[0], [1]]), torch.ones(2, 1), experts.addresses())
    for out in (torch.zeros(1, 128), torch.zeros(2, 128).half(), torch.zeros(128, 2).t()):
        with pytest.raises(AssertionError):
            ops.add_routed_experts(out, *call, experts.layout)


def test_half_precision_inputs(backend: str) -> None:
    experts = experts_of(QuantScheme())
    hidden = random(3, 128).bfloat16()
    ids, weights = torch.tensor([[1], [0], [1]]), torch.ones(3, 1).bfloat16() / 3
    y = ops.routed_experts(hidden, ids, weights, experts.addresses(), experts.layout)
    assert_close(y, experts.contributions(hidden, ids, weights, False))


def test_a_choice_that_is_no_expert_is_our_bug(backend: str) -> None:
    experts = experts_of(QuantScheme())
    for wrong in (-1, 5):
        with pytest.raises(AssertionError, match="was chosen"):
            ops.routed_experts(
                random(1, 128), torch.tensor([[wrong]]), torch.ones(1, 1),
                experts.addresses(), experts.layout,
            )  # fmt: skip


def test_schemas_and_shape_functions() -> None:
    weight = quantize(random(32, 64), QuantScheme())
    x = random(3, 64)
    check = functools.partial(
        torch.library.opcheck,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    check(torch.ops.moecli.linear_quantized.default, (x, weight.packed, weight.scale, 4, 32))
    check(torch.ops.moecli.linear_float.default, (x, random(16, 64).bfloat16()))
    experts = experts_of(QuantScheme())
    ids, weights = torch.tensor([[0, 3], [1, 3]]), torch.ones(2, 2)
    flat = (256, 4, 32, "silu", True, 64, 256)
    for biases in (None, random(experts.num_experts, 2 * 256 + 128)):
        call = (random(2, 128), ids, weights, experts.addresses(), biases, *flat)
        check(torch.ops.moecli.routed_experts.default, call)
        check(torch.ops.moecli.add_routed_experts.default, (random(2, 128), *call))


def test_scratch_survives_inference_mode() -> None:
    ops.set_backend("torch")
    weight, x = quantize(random(32, 4096), QuantScheme()), random(1, 4096)
    with torch.inference_mode():
        inside = ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), inside)


def test_the_cpu_never_meets_triton() -> None:
    code = """
import sys, torch
from quant import ops
from quant.quantize import quantize
from quant.scheme import QuantScheme
assert ops.current_backend() == "auto"
ops.linear(torch.ones(2, 64), quantize(torch.ones(8, 64), QuantScheme()))
print("triton" in sys.modules)
"""
    assert python(code) == "False"


def test_kernels_for_cuda_refuse_the_cpu_outside_of_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from quant import errors, ops
ops.set_backend("triton")
try:
    ops.linear(torch.ones(2, 64), torch.ones(8, 64))
except errors.QuantError as error:
    print(error, "|", error.hint)
"""
    said = python(code, TRITON_INTERPRET="0")
    assert "`triton` cannot compute on cpu" in said
    assert "TRITON_INTERPRET=1" in said


def test_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    ops._triton_backend.cache_clear()
    with pytest.raises(QuantError, match="not installed"):
        ops.set_backend("triton")
    assert ops.current_backend() != "triton"


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(QuantError, match="`fast`"):
        ops.set_backend("fast")
