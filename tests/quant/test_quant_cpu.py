"""The compiled kernels for the processor, every variant that runs here: against fp64."""

import functools

import pytest
import torch
from torch import Tensor

from quant.kernels.cpu.backend import CpuBackend
from quant.kernels.cpu.library import Library, NoLibrary, library
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from tests.quant.quant_experts import assert_close, random_weight

try:
    ISAS = library().isas
except NoLibrary:
    pytest.skip("there is no compiler here", allow_module_level=True)

SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
# Activations of 8 bits: a product of many rows is off by this part of its length, a layer by more.
PRODUCT, LAYER = 0.0055, 0.013


@pytest.fixture(params=ISAS)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return backend_of(request.param)


@functools.cache
def backend_of(isa: str) -> CpuBackend:
    return CpuBackend(Library(library().path, isa))


def assert_near(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / exact.norm()
    assert error <= tolerance, f"off by {error:.2%}"


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Values that 8 bits hold without loss in any group: integers, and 127 among any 4."""
    x = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()
    x[..., ::4] = 127.0
    return x


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (33, 3), (70, 5), (131, 9)])
def test_products_of_what_8_bits_hold_are_exact(
    backend: CpuBackend, scheme: QuantScheme, shape: tuple[int, int]
) -> None:
    out_features, in_features = shape[0], shape[1] * scheme.group_size
    weight = random_weight(out_features, in_features, scheme, seed=1)
    for num_tokens in (*range(10), 17, 33):
        x = integers(num_tokens, in_features, seed=num_tokens) / 64
        exact = x.double() @ dequantize(weight, torch.float64).t()
        y = backend.linear_quantized(x, weight)
        if num_tokens <= 8:
            assert_close(y, exact, 2e-6)
        elif num_tokens:
            assert_near(y, exact, PRODUCT)
