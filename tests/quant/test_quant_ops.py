"""Every op, every backend: against an fp64 oracle, by shapes, and alone among absent experts."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quant import ops
from quant.errors import QuantError
from quant.layout import ExpertLayout, ExpertWeights
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme

SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
TOLERANCE = 1e-5  # of the largest output


@pytest.fixture(params=["reference", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.current_backend()
    ops.set_backend(request.param)
    yield request.param
    ops.set_backend(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == exact.shape
    if exact.numel():
        error = (actual.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"differs by {error:.1e} of the largest output"


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


class Experts:
    """Random experts of one layer in memory, and what they compute in fp64."""

    def __init__(self, scheme: QuantScheme, num_experts: int = 5) -> None:
        self.layout = ExpertLayout(128, 256, scheme)
        self.blobs = []
        for expert in range(num_experts):
            weights = [
                quantize(random(*shape, seed=3 * expert + i) / 8, scheme, "nearest")
                for i, shape in enumerate(self.layout.projections.values())
            ]
            blob = torch.zeros(self.layout.slot_nbytes, dtype=torch.uint8)
            self.layout.write(ExpertWeights(*weights), blob)
            self.blobs.append(blob)

    def addresses(self, present: set[int] | None = None) -> Tensor:
        return torch.tensor(
            [
                blob.data_ptr() if present is None or expert in present else 0
                for expert, blob in enumerate(self.blobs)
            ]
        )

    def exact(self, expert: int, x: Tensor) -> Tensor:
        weights = self.layout.views(self.blobs[expert])
        gate, up, down = (
            dequantize(w, torch.float64) for w in (weights.gate, weights.up, weights.down)
        )
        return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def contributions(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, weight_on_input: bool
    ) -> Tensor:
        out = torch.zeros(*ids.shape, hidden.shape[1], dtype=torch.float64)
        for t, k in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
            x, w = hidden[t].double(), weights[t, k].double()
            expert = int(ids[t, k])
            out[t, k] = self.exact(expert, x * w if weight_on_input else x)
            if not weight_on_input:
                out[t, k] *= w
        return out


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
    experts = Experts(scheme)
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
    experts = Experts(QuantScheme())
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
    experts = Experts(QuantScheme())
    y = ops.routed_experts(
        random(2, 128), torch.tensor([[0, 1], [4, 2]]), torch.ones(2, 2),
        experts.addresses(set()), experts.layout,
    )  # fmt: skip
    assert y.shape == (2, 2, 128)
    assert (y == 0).all()


def test_half_precision_inputs(backend: str) -> None:
    experts = Experts(QuantScheme())
    hidden = random(3, 128).bfloat16()
    ids, weights = torch.tensor([[1], [0], [1]]), torch.ones(3, 1).bfloat16() / 3
    y = ops.routed_experts(hidden, ids, weights, experts.addresses(), experts.layout)
    assert_close(y, experts.contributions(hidden, ids, weights, False))


def test_a_choice_that_is_no_expert_is_our_bug(backend: str) -> None:
    experts = Experts(QuantScheme())
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
    experts = Experts(QuantScheme())
    ids, weights = torch.tensor([[0, 3], [1, 3]]), torch.ones(2, 2)
    check(
        torch.ops.moecli.routed_experts.default,
        (random(2, 128), ids, weights, experts.addresses(), 256, 4, 32, "silu", True),
    )


def test_scratch_survives_inference_mode() -> None:
    ops.set_backend("torch")
    weight, x = quantize(random(32, 4096), QuantScheme()), random(1, 4096)
    with torch.inference_mode():
        inside = ops.linear(x, weight)
    assert torch.equal(ops.linear(x, weight), inside)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(QuantError, match="`fast`"):
        ops.set_backend("fast")
