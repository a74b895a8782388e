"""Dense weights in bitsandbytes' schemes, against bitsandbytes' own functions and modules."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant import bnb
from quant.bnb import BnbWeight, LlmInt8Weight, Nf4Weight, bnb_nbytes, load, parse_scheme
from quant.errors import QuantError
from quant.ops import linear
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme

CPU = torch.device("cpu")
SHAPES = [(64, 64), (50, 96), (5, 32), (7, 33), (1, 1), (300, 128), (129, 72)]
# The smallest positive value of each, relative to 1.
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight here takes several tiles, as only large ones do otherwise."""
    monkeypatch.setattr(bnb, "_TILE_VALUES", 1000)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nf4_values(weight: Nf4Weight) -> Tensor:
    """fp64 [O, I], from the definition of the format alone."""
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).flatten()
    count = weight.out_features * weight.in_features
    levels = load().get_4bit_type("nf4", device="cpu").double()[codes[:count].long()]
    absmax = weight.absmax.double()
    if weight.nested is not None:
        coarse = weight.nested.absmax.double().repeat_interleave(256)[: len(absmax)]
        absmax = weight.nested.code.double()[weight.absmax.long()] * coarse + weight.nested.offset
    return (levels * absmax.repeat_interleave(64)[:count]).view(weight.shape)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_quantized_as_bitsandbytes_does(shape: tuple[int, int], double: bool) -> None:
    original = random(*shape).bfloat16()
    weight = Nf4Weight.make(original, CPU, double)
    packed, state = load().quantize_4bit(original, quant_type="nf4", compress_statistics=double)
    assert torch.equal(weight.packed, packed)
    assert torch.equal(weight.absmax, state.absmax)
    if double:
        assert weight.nested is not None
        assert torch.equal(weight.nested.absmax, state.state2.absmax)
        assert torch.equal(weight.nested.code, state.state2.code)
        assert weight.nested.offset == state.offset
    torch.testing.assert_close(weight.dequantize().double(), nf4_values(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (70, 128), (256, 192)])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_dequantizes_as_bitsandbytes_does(shape: tuple[int, int], double: bool) -> None:
    """Where rows are whole blocks; elsewhere its AVX-512 code is wrong and ours is not."""
    original = random(*shape)
    weight = Nf4Weight.make(original, CPU, double)
    packed, state = load().quantize_4bit(original, quant_type="nf4", compress_statistics=double)
    assert torch.equal(weight.dequantize(), load().dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_product(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    weight = Nf4Weight.make(random(*shape), CPU, double)
    x = random(2, 3, shape[1], seed=1).to(dtype)
    expected = x.double() @ nf4_values(weight).t()
    out = linear(x, weight)
    assert out.dtype == dtype
    assert out.shape == (2, 3, shape[0])
    bound = 2 * EPSILON[dtype] * (x.double().abs() @ nf4_values(weight).abs().t())
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (70, 128)])
def test_fused_product_of_devices(shape: tuple[int, int], double: bool) -> None:
    """What other devices call; here bitsandbytes computes it unfused."""
    weight = Nf4Weight.make(random(*shape), CPU, double)
    x = random(4, shape[1], seed=1)
    torch.testing.assert_close(weight._fused(x), weight.linear(x), rtol=1e-5, atol=1e-5)


def test_it_is_never_given_what_the_repacked_kernel_takes() -> None:
    """Its gemv on CPUs with AVX512-BF16 gives garbage for the layout that is kept here."""
    weight = Nf4Weight.make(random(64, 64), CPU)
    seen = recorded(lambda: weight.linear(random(1, 64)))
    assert not [op for op in seen if op.startswith("bitsandbytes.gemv_4bit")]
    assert [op for op in seen if op.startswith("bitsandbytes.dequantize_4bit")]


@pytest.mark.parametrize("shape", SHAPES)
def test_llm_int8_is_quantized_as_bitsandbytes_does(shape: tuple[int, int]) -> None:
    original = random(*shape).bfloat16()
    weight = BnbWeight.of(original, "llm-int8", "cpu")
    assert isinstance(weight, LlmInt8Weight)
    codes, absmax, _ = load().int8_vectorwise_quant(original.half())
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.absmax, absmax)
    exact = codes.double() * absmax.double()[:, None] / 127
    torch.testing.assert_close(weight.dequantize().double(), exact, rtol=1e-6, atol=0)


def tokens_with_outliers(count: int, features: int, outliers: int, dtype: torch.dtype) -> Tensor:
    """Each outlier column is large in one token and ordinary in the others."""
    x = random(count, features, seed=count).clamp(-5, 5)
    columns = torch.randperm(features, generator=torch.Generator().manual_seed(1))[:outliers]
    x[torch.arange(outliers) % count, columns] = 6 + 10 * torch.rand(outliers)
    return x.to(dtype)


def library_product(weight: LlmInt8Weight, x: Tensor) -> Tensor:
    """As Linear8bitLt computes it in inference, with its default threshold."""
    import bitsandbytes

    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB = weight.codes, weight.absmax
    state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
    return bitsandbytes.matmul(x, weight.codes, state=state)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 7, 32])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
def test_llm_int8_product(count: int, outliers: int, dtype: torch.dtype) -> None:
    weight = LlmInt8Weight.make(random(48, 96), CPU)
    x = tokens_with_outliers(count, 96, outliers, dtype)
    expected = library_product(weight, x.clone())
    out = linear(x.clone(), weight)
    assert out.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * EPSILON[dtype] * scale)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 8), st.integers(4, 70), st.integers(1, 20), st.integers(0, 32), st.integers(0, 9)
)
def test_steps_are_what_waiting_gives(
    count: int, features: int, out: int, outliers: int, seed: int
) -> None:
    weight = LlmInt8Weight.make(random(out, features, seed=seed), CPU)
    x = tokens_with_outliers(count, features, min(outliers, features), torch.float32)
    expected = weight._mixed(x.clone())
    torch.testing.assert_close(weight._step(x), expected, rtol=1e-5, atol=1e-4)


def test_more_outliers_than_are_kept_apart_cost_precision_not_sense() -> None:
    weight = LlmInt8Weight.make(random(48, 256), CPU)
    x = tokens_with_outliers(2, 256, 100, torch.float32)
    exact = x @ weight.dequantize().t()
    assert (weight._step(x) - exact).norm() < 0.02 * exact.norm()


def test_values_beyond_fp16_are_outliers() -> None:
    weight = LlmInt8Weight.make(random(48, 64), CPU)
    x = random(2, 64)
    x[0, 5] = 1e6
    exact = x @ weight.dequantize().t()
    torch.testing.assert_close(weight._step(x), exact, rtol=1e-2, atol=0.2)


class Recorder(TorchDispatchMode):
    """Notes every op: its name, and of plain arguments their values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg for arg in args if isinstance(arg, int | float | str)]
        self.seen.append(" ".join(map(str, (func.overloadpacket, *plain))))
        return func(*args, **(kwargs or {}))


def recorded(run: Any) -> list[str]:
    """The ops that `run` calls."""
    with Recorder() as recorder:
        run()
    return recorder.seen


@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_step_waits_for_no_value(scheme: str, count: int) -> None:
    """A CUDA graph can hold it: no op of it asks the device for a number or an unknown size."""
    weight = BnbWeight.of(random(48, 128), scheme, "cpu")
    x, x_large = random(count, 128), 100 * random(count, 128)
    plain = recorded(lambda: weight.linear(x))
    large = recorded(lambda: weight.linear(x_large))
    waits = ("aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.is_nonzero")
    # With a threshold it looks, inside the op, whether there are outliers.
    waits += ("bitsandbytes.int8_vectorwise_quant 6", "bitsandbytes.int8_mixed_scaled_mm")
    assert not [op for op in plain if op.startswith(waits)]
    assert plain == large
    assert any(op.startswith("bitsandbytes.") for op in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_captured_step(scheme: str, count: int) -> None:
    weight = BnbWeight.of(random(256, 512), scheme, "cuda")
    x = random(count, 512).bfloat16().cuda()
    expected = x.float() @ weight.dequantize().t()
    assert (linear(x, weight) - expected).norm() < 0.02 * expected.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, weight)
    x.copy_(20 * random(count, 512, seed=1))  # with outliers
    graph.replay()
    assert torch.equal(out, linear(x, weight))


@pytest.mark.parametrize("stored", [QuantScheme(8, 32), QuantScheme(4, 32)], ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
def test_stored_weights_are_requantized(scheme: str, stored: QuantScheme) -> None:
    original = quantize(random(70, 96), stored)
    weight = BnbWeight.of(original, scheme, "cpu")
    expected = BnbWeight.of(dequantize(original), scheme, "cpu")
    assert (weight.out_features, weight.in_features) == (70, 96)
    assert torch.equal(weight.dequantize(), expected.dequantize())


@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_known_beforehand(scheme: Any, shape: tuple[int, int]) -> None:
    assert BnbWeight.of(random(*shape), scheme, "cpu").nbytes == bnb_nbytes(scheme, *shape)


def test_bits_per_weight() -> None:
    assert bnb_nbytes("nf4", 8192, 5120) * 8 / (8192 * 5120) == pytest.approx(4.127, abs=1e-3)
    assert bnb_nbytes("llm-int8", 8192, 5120) * 8 / (8192 * 5120) == pytest.approx(8.006, abs=1e-3)


def test_unknown_scheme() -> None:
    with pytest.raises(QuantError, match="unknown scheme `fp4`") as caught:
        parse_scheme("fp4")
    assert caught.value.hint == "use one of nf4, llm-int8"


def test_a_device_that_bitsandbytes_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    functional, library = bnb._import()
    monkeypatch.setattr(library, "compiled_with_cuda", False, raising=False)
    monkeypatch.setattr(bnb, "_import", lambda: (functional, library))
    with pytest.raises(QuantError, match="cannot compute on `cuda:0`") as caught:
        BnbWeight.of(random(4, 64), "nf4", "cuda:0")
    assert "--dense-scheme stored" in str(caught.value.hint)


@pytest.fixture
def hub_package(tmp_path: Any) -> Iterator[str]:
    """A directory with a package `kernels` that says when it is asked to download."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('DOWNLOAD')\n")
    return str(tmp_path)


def test_importing_it_downloads_nothing_and_says_nothing(hub_package: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {hub_package!r})\n"
        "from quant.bnb import load\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "load()\n"
        "import kernels; kernels.get_kernel"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
