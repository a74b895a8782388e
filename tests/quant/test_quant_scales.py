"""The compiled search for scales: what the tiles of torch find, to the last bit."""

import pytest
import torch
from torch import Tensor

import quant.quantize
from quant.errors import QuantError
from quant.kernels.cpu.library import Library, NoLibrary, library
from quant.quantize import SquaredError, quantize_measured
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

try:
    ISAS = library().isas
except NoLibrary:
    pytest.skip("there is no compiler here", allow_module_level=True)

SCHEMES = [QuantScheme(bits, group) for bits in (4, 8) for group in (32, 64, 128)]
SHAPES = [(1, 128), (3, 128), (7, 384), (33, 1024), (2, 12800)]


def quantized_by(
    source: Library | None, weight: Tensor, scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> tuple[QuantizedWeight, SquaredError]:
    monkeypatch.setattr(quant.quantize, "_compiled", lambda: source)
    return quantize_measured(weight, scheme)


def weights(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    normal = torch.randn(shape, generator=generator)
    dying = normal.clone()
    dying[:, :128] = 0
    dying[-1] *= 1e-4 if dtype == torch.float16 else 1e-36
    made = {
        "normal": normal,
        "with outliers": normal**3 / 8,
        "dying": dying,
        "few values": torch.randint(-3, 4, shape, generator=generator),
        "negative": -normal.abs(),
    }
    return {name: weight.to(dtype) for name, weight in made.items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_every_bit_is_the_same(
    isa: str, scheme: QuantScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Library(library().path, isa)
    for shape in SHAPES:
        for name, weight in weights(shape, dtype).items():
            expected, expected_error = quantized_by(None, weight, scheme, monkeypatch)
            found, error = quantized_by(compiled, weight, scheme, monkeypatch)
            assert torch.equal(found.packed, expected.packed), (name, shape)
            assert torch.equal(found.scale, expected.scale), (name, shape)
            assert error == expected_error, (name, shape)


@pytest.mark.parametrize("isa", ISAS)
def test_strides_and_threads_do_not_matter(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, scheme = Library(library().path, isa), QuantScheme(4, 32)
    weight = torch.randn(4096, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, _ = quantized_by(None, weight.t().contiguous(), scheme, monkeypatch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found, _ = quantized_by(compiled, weight.t(), scheme, monkeypatch)
            assert torch.equal(found.packed, expected.packed)
            assert torch.equal(found.scale, expected.scale)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 2.0**126, -(2.0**126)]
)
def test_what_is_no_weight_is_refused_wherever_it_stands(
    isa: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Library(library().path, isa)
    for scheme in SCHEMES:
        for place in (0, 5, 129, 383):
            weight = torch.randn(1, 384)
            weight[0, place] = value
            for source in (None, compiled):
                with pytest.raises(QuantError, match="NaN, infinite or absurdly large"):
                    quantized_by(source, weight, scheme, monkeypatch)


def test_without_vectors_torch_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    quant.quantize._compiled.cache_clear()
    monkeypatch.setattr(quant.quantize, "library", lambda: Library(library().path, "portable"))
    assert quant.quantize._compiled() is None
    quant.quantize._compiled.cache_clear()
