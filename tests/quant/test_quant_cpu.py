"""The compiled kernels for the processor, every variant that runs here: against fp64."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import ops
from quant.errors import QuantError
from quant.kernels.cpu.backend import CpuBackend
from quant.kernels.cpu.library import Library, NoLibrary, library
from quant.layout import ExpertLayout
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight
from tests.quant.quant_experts import Experts, assert_close, random, random_weight

try:
    ISAS = library().isas
except NoLibrary:
    pytest.skip("the kernels are not compiled", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
PRODUCT = 0.005  # of the length of a result: what 8-bit activations cost a product
LAYER = 0.015  # and three products in a row, of small experts


@pytest.fixture(params=ISAS)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return backend_of(request.param)


@functools.cache
def backend_of(isa: str) -> CpuBackend:
    return CpuBackend(Library(library().path, isa))


@pytest.fixture
def threads() -> Iterator[None]:
    """Sets the number back that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_near(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / exact.norm()
    assert error <= tolerance, f"off by {error:.2%}"


def representable(*shape: int, seed: int = 0) -> Tensor:
    """Values that 8 bits hold without loss: integers with a 127 in every group, scaled.

    No two groups that follow each other have the same scale.
    """
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., ::32] = 127.0
    return x / 64 * 2.0 ** (torch.arange(shape[-1]) // 32 % 3)


def experts_of(
    backend: CpuBackend, experts: Experts, hidden: Tensor, ids: Tensor, weights: Tensor,
    *, present: set[int] | None = None, weight_on_input: bool = False,
    span: tuple[int, int] | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Contributions, or what was added to `out`."""
    layout = experts.layout
    call = (hidden, ids, weights, experts.addresses(present), layout)
    options = {
        "activation": "silu",
        "weight_on_input": weight_on_input,
        "span": span or (0, layout.intermediate_size),
    }
    if out is None:
        return backend.routed_experts(*call, **options)
    backend.add_routed_experts(out, *call, **options)
    return out


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (33, 3), (70, 5), (131, 9), (53, 66)])
def test_what_8_bits_hold_is_multiplied_exactly(
    backend: CpuBackend, scheme: QuantScheme, shape: tuple[int, int]
) -> None:
    out_features, in_features = shape[0], shape[1] * scheme.group_size
    weight = random_weight(out_features, in_features, scheme, seed=1)
    for num_tokens in (*range(14), 17, 33):
        x = representable(num_tokens, in_features, seed=num_tokens)
        exact = x.double() @ dequantize(weight, torch.float64).t()
        assert_close(backend.linear_quantized(x, weight), exact, 3e-6)


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(8, 128)], ids=str)
@pytest.mark.parametrize("in_features", [2048, 5120])
def test_a_product_is_off_by_half_a_percent_at_most(
    backend: CpuBackend, scheme: QuantScheme, in_features: int
) -> None:
    weight = random_weight(96, in_features, scheme, seed=1)
    for num_tokens in (1, 2, 3, 16):
        x = random(num_tokens, in_features, seed=num_tokens)
        exact = x.double() @ dequantize(weight, torch.float64).t()
        # Few results scatter around the expected error: the inputs' own is what is promised.
        many = backend.linear_quantized(x, weight)
        assert_near(many, exact, PRODUCT * (1 + 4 / (96 * num_tokens) ** 0.5))


def test_few_tokens_and_many_round_activations_alike(backend: CpuBackend) -> None:
    """A prompt computed at once and token by token must not drift apart."""
    weight = random_weight(70, 384, QuantScheme(), seed=1)
    x = random(20, 384)
    together = backend.linear_quantized(x, weight)
    alone = torch.cat([backend.linear_quantized(row[None], weight) for row in x])
    assert_close(alone, together.double(), 1e-6)


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_zeros_huge_tiny_and_no_numbers(backend: CpuBackend, num_tokens: int) -> None:
    weight = random_weight(33, 96, QuantScheme(), seed=1)
    x = representable(num_tokens, 96)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    assert (backend.linear_quantized(x * 0, weight) == 0).all()
    for factor in (1e33, 1e-27):
        assert_close(backend.linear_quantized(x * factor, weight), exact * factor, 1e-5)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 45, 95):
            broken = x.clone()
            broken[-1, place] = wrong
            y = backend.linear_quantized(broken, weight)
            assert y[-1].isnan().all()
            assert_close(y[:-1], exact[:-1], 3e-6)


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_weights_lie_anywhere(backend: CpuBackend, num_tokens: int, offset: int) -> None:
    layout = ExpertLayout(96, 160, QuantScheme())
    aligned = Experts(layout, num_experts=1)
    memory = torch.full((layout.nbytes + 16,), 0xFF, dtype=torch.uint8)
    memory[offset : offset + layout.nbytes] = aligned.blob(0)
    address = torch.tensor([memory.data_ptr() + offset])
    hidden, ids = random(num_tokens, 96), torch.zeros(num_tokens, 1, dtype=torch.int64)
    call = (hidden, ids, torch.ones(num_tokens, 1))
    options = {"activation": "silu", "weight_on_input": False, "span": (0, 160)}
    y = backend.routed_experts(*call, address, layout, **options)
    assert torch.equal(y, backend.routed_experts(*call, aligned.addresses(), layout, **options))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20, 61])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_routed_experts(
    backend: CpuBackend, scheme: QuantScheme, num_tokens: int, weight_on_input: bool
) -> None:
    """Experts that nobody chose, few and many tokens at once, one expert absent, and spans."""
    experts = Experts(ExpertLayout(384, 256, scheme), num_experts=6)
    ids = random(num_tokens, 5, seed=1).argsort(-1)[:, :3]
    ids[num_tokens // 2 :] = torch.tensor([0, 3, 1])
    hidden, weights = random(num_tokens, 384), random(num_tokens, 3, seed=2)
    present = {0, 1, 3, 4, 5}
    for span in (None, (0, 128), (128, 256)):
        options = {"present": present, "weight_on_input": weight_on_input, "span": span}
        exact = experts.contributions(hidden, ids, weights, **options)
        y = experts_of(backend, experts, hidden, ids, weights, **options)
        assert_near(y, exact, LAYER)
        assert (y[ids == 2] == 0).all()
        before = random(num_tokens, 384, seed=5)
        added, summed = before.clone(), before.clone()
        experts_of(backend, experts, hidden, ids, weights, **options, out=added)
        backend.add_contributions(summed, y, ids)
        assert torch.equal(added, summed)
        assert_near(added - before, exact.sum(1), LAYER)


def test_waves_are_bitwise_one(backend: CpuBackend) -> None:
    experts = Experts(ExpertLayout(128, 256, QuantScheme()))
    hidden, ids = random(40, 128), random(40, 5, seed=1).argsort(-1)[:, :3]
    weights = random(40, 3, seed=2).sigmoid()
    whole = experts_of(backend, experts, hidden, ids, weights)
    waves = [
        experts_of(backend, experts, hidden, ids, weights, present=wave)
        for wave in ({4, 0}, {3}, {1, 2})
    ]
    assert torch.equal(torch.stack(waves).sum(0), whole)
    at_once, in_waves = torch.zeros(40, 128), torch.zeros(40, 128)
    experts_of(backend, experts, hidden, ids, weights, out=at_once)
    backend.add_contributions(in_waves, torch.stack(waves).sum(0), ids)
    assert torch.equal(at_once, in_waves)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(backend: CpuBackend, num_tokens: int) -> None:
    experts = Experts(ExpertLayout(544, 288, QuantScheme()))
    hidden, ids = random(num_tokens, 544), random(num_tokens, 5, seed=1).argsort(-1)[:, :2]
    call = (backend, experts, hidden, ids, random(num_tokens, 2, seed=2))
    weight = random_weight(300, 544, QuantScheme(8, 32), seed=3)
    torch.set_num_threads(1)
    alone, product = experts_of(*call), backend.linear_quantized(hidden, weight)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(experts_of(*call), alone)
            assert torch.equal(backend.linear_quantized(hidden, weight), product)


@pytest.mark.usefixtures("threads")
def test_all_threads_take_denormals_as_the_calling_one_does() -> None:
    """Else a result depends on who computed it."""
    backend = backend_of(ISAS[0])
    hidden, weight = torch.full((1, 64), 1e-40), torch.ones(4000, 64, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    for flush in (True, False) if torch.set_flush_denormal(False) else ():
        torch.set_flush_denormal(flush)
        try:
            outs = [backend.linear_float(hidden, weight) for _ in range(200)]
        finally:
            torch.set_flush_denormal(False)
        assert all(bool(((out == 0) == flush).all()) for out in outs)


@pytest.mark.usefixtures("threads")
def test_two_threads_of_python_may_call_at_once() -> None:
    backend = backend_of(ISAS[0])
    experts = Experts(ExpertLayout(128, 256, QuantScheme()))
    hidden, ids = random(9, 128), random(9, 5, seed=1).argsort(-1)[:, :3]
    weights = torch.ones(9, 3)
    torch.set_num_threads(2)
    expected = experts_of(backend, experts, hidden, ids, weights)
    wrong: list[int] = []

    def call_often() -> None:
        torch.set_num_threads(2)
        for step in range(100):
            if not torch.equal(experts_of(backend, experts, hidden, ids, weights), expected):
                wrong.append(step)

    callers = [threading.Thread(target=call_often) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_fork_computes_on_with_threads_of_its_own() -> None:
    code = """
import os, sys, torch
from quant import ops
from quant.quantize import quantize
torch.set_num_threads(2)
weight = quantize(torch.randn(300, 128), ops.QuantScheme())
x = torch.randn(1, 128)
before = ops.linear(x, weight)
child = os.fork()
same = all(torch.equal(ops.linear(x, weight), before) for _ in range(50))
if child == 0:
    os._exit(0 if same else 1)
print(same, os.waitpid(child, 0)[1])
"""
    assert python(code) == "True 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (77, 100), (300, 1024), (9, 4096)])
def test_float_weights(backend: CpuBackend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random(*shape).to(dtype)
    weight[0, 0] = 2.0**-20  # less than fp16's smallest normal number
    for num_tokens in (0, 1, 2, 3, 5, 8, 20):
        x = random(num_tokens, shape[1], seed=1)
        assert_close(backend.linear_float(x, weight), x.double() @ weight.double().t(), 2e-6)


def test_several_products_of_one_input_are_those_of_each(backend: CpuBackend) -> None:
    scheme = QuantScheme(8, 64)
    weights = [random_weight(rows, 192, scheme, seed=rows) for rows in (33, 1, 128, 65)]
    for num_tokens in (0, 1, 4, 19):
        x = random(num_tokens, 192)
        for y, weight in zip(backend.linears_quantized(x, weights), weights, strict=True):
            assert torch.equal(y, backend.linear_quantized(x, weight))


def test_a_part_of_a_weight_is_multiplied_where_it_lies(backend: CpuBackend) -> None:
    weight = random_weight(40, 256, QuantScheme(4, 64), seed=1)
    part = QuantizedWeight(weight.packed[3:20, 8:24], weight.scale[3:20, 1:3], weight.scheme)
    x = representable(3, 128)
    assert_close(
        backend.linear_quantized(x, part), x.double() @ dequantize(part, torch.float64).t(), 3e-6
    )


def test_silu_is_right_far_out(backend: CpuBackend) -> None:
    """Gates from -200 to 200, one a row of hidden, by an expert whose up is 1 and down one."""
    scheme, layout = QuantScheme(8, 32), ExpertLayout(32, 32, QuantScheme(8, 32))
    eye = QuantizedWeight(
        (torch.eye(32) + 128).to(torch.uint8).view(torch.int32),
        torch.ones(32, 1).bfloat16(),
        scheme,
    )
    first = torch.zeros(32, 32)
    first[:, 0] = 1
    one = QuantizedWeight((first + 128).to(torch.uint8).view(torch.int32), eye.scale, scheme)
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.write(type(layout.views(blob))(eye, one, eye), blob)
    gates = torch.linspace(-200, 200, 41)
    hidden = torch.zeros(41, 32)
    hidden[:, 0], hidden[:, 1] = gates.abs().max() * 0 + 127, gates / 200 * 127
    hidden = hidden.round()
    y = backend.routed_experts(
        hidden, torch.zeros(41, 1, dtype=torch.int64), torch.ones(41, 1),
        torch.tensor([blob.data_ptr()]), layout,
        activation="silu", weight_on_input=False, span=(0, 32),
    )[:, 0]  # fmt: skip
    exact = torch.nn.functional.silu(hidden.double()) * 127
    assert_close(y, exact, 0.005)


def test_a_choice_that_is_no_expert_is_our_bug(backend: CpuBackend) -> None:
    experts = Experts(ExpertLayout(64, 64, QuantScheme()))
    for wrong in (-1, 5):
        with pytest.raises(AssertionError, match="was chosen"):
            experts_of(backend, experts, random(1, 64), torch.tensor([[wrong]]), torch.ones(1, 1))


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


SAYS = """
from quant import errors, ops
import torch
try:
    print(ops.linear(torch.ones(1, 32), torch.ones(2, 32)).tolist(), ops.fallback())
    ops.set_backend("cpu")
    print(ops.cpu_isa())
except errors.QuantError as error:
    print(error, "|", error.hint)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_names_the_variant(isa: str) -> None:
    assert python(SAYS, MOECLI_CPU_ISA=isa).splitlines()[-1] == isa


def test_a_variant_that_is_not_here_is_refused_with_those_that_are() -> None:
    said = python(SAYS, MOECLI_CPU_ISA="avx1024")
    assert "`avx1024`" in said
    assert f"use one of {', '.join(ISAS)}" in said


def test_without_the_library_torch_computes_and_the_reason_is_told(tmp_path: Path) -> None:
    said = python(SAYS, MOECLI_CPU_LIBRARY=str(tmp_path / "none.so")).splitlines()
    assert said[0] == "[[32.0, 32.0]] the kernels for the processor are not compiled"
    assert "python -m quant.kernels.cpu.build" in said[1]


def test_a_library_of_another_version_is_not_used(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"no library")
    with pytest.raises(NoLibrary, match="cannot be loaded"):
        Library(garbage)


def test_the_kernels_refuse_other_devices() -> None:
    before = ops.current_backend()
    ops.set_backend("cpu")
    try:
        with pytest.raises(QuantError, match="cannot compute on meta"):
            ops._backend(torch.empty(1, device="meta"))
    finally:
        ops.set_backend(before)
