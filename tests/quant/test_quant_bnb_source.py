"""Checkpoints that bitsandbytes has quantized, read as if they were not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quant_sources import make_job, random_weights, write_source
from safetensors.torch import save_file
from torch import Tensor

from quant.bnb import load
from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.errors import QuantError
from quant.items import SliceReader, TensorSlice
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from quant.sources.opening import open_source
from quant.sources.packed import PackedCheckpoint
from quant.tensor import QuantizedWeight

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4"},
    "nf4-double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4"},
    "fp4-double": {"quant_type": "fp4", "compress_statistics": True},
    "nf4-bf16-storage": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "nf4-double-fp32-storage": {
        "quant_type": "nf4",
        "compress_statistics": True,
        "quant_storage": torch.float32,
    },
    "nf4-32": {"quant_type": "nf4", "blocksize": 32},
    "nf4-4096": {"quant_type": "nf4", "blocksize": 4096, "compress_statistics": True},
}


def packed(name: str, weight: Tensor, **how: Any) -> dict[str, Tensor]:
    """What bitsandbytes saves for a Linear4bit."""
    codes, state = load().quantize_4bit(weight, **how)
    saved = state.as_dict(packed=True)
    return {name: codes} | {f"{name}.{key}": value.clone() for key, value in saved.items()}


def packed_in_8_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes saves for a Linear8bitLt."""
    codes, absmax, _ = load().int8_vectorwise_quant(weight.half())
    module = name.removesuffix(".weight")
    layout = torch.tensor(0, dtype=torch.uint8)
    return {name: codes, f"{module}.SCB": absmax, f"{module}.weight_format": layout}


def library_values(tensors: dict[str, Tensor], name: str) -> Tensor:
    """As the library dequantizes it, given as one row: with several it errs on some CPUs."""
    prefix = f"{name}."
    parts = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    state = load().QuantState.from_dict(parts, torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([math.prod(state.shape)])
    return load().dequantize_4bit(tensors[name], state).view(shape)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "test"}))
    save_file(tensors, path / "model.safetensors")
    return path


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(128, 64), (40, 96), (300, 72)])
def test_four_bits(tmp_path: Path, shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    tensors = packed("a.weight", random(*shape, dtype=dtype), **FORMATS[form])
    source = open_source(write(tmp_path, tensors))
    assert set(source.tensors) == {"a.weight"}
    info = source.info("a.weight")
    assert (info.dtype, info.shape) == (dtype, shape)
    assert info.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    expected = library_values(tensors, "a.weight")
    assert expected.dtype == dtype
    assert torch.equal(source.read("a.weight"), expected)
    assert torch.equal(source.read_slice("a.weight", 3), expected[3])


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 70), st.integers(1, 600), st.data())
def test_any_rows(tmp_path: Path, form: str, rows: int, columns: int, data: st.DataObject) -> None:
    if FORMATS[form].get("quant_storage") and rows * columns % 8:
        columns *= 8  # the library cannot store the others so
    tensors = packed("a.weight", random(rows, columns, seed=rows), **FORMATS[form])
    source = open_source(write(tmp_path, tensors))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    codes = tensors["a.weight"].flatten().view(torch.uint8)
    state = load().QuantState.from_dict(
        {k.removeprefix("a.weight."): v for k, v in tensors.items() if k != "a.weight"}, "cpu"
    )
    levels = state.code[torch.stack((codes >> 4, codes & 15), dim=-1).flatten().long()]
    absmax = state.absmax
    if state.nested:
        absmax = load().dequantize_blockwise(absmax, state.state2) + state.offset
    count = rows * columns
    exact = levels[:count] * absmax.repeat_interleave(state.blocksize)[:count]
    expected = exact.view(rows, columns).bfloat16()
    assert torch.equal(source.read_rows("a.weight", start, stop), expected[start:stop])


@pytest.mark.parametrize("with_format", [True, False])
def test_eight_bits(tmp_path: Path, with_format: bool) -> None:
    tensors = packed_in_8_bits("a.weight", random(50, 96))
    if not with_format:
        del tensors["a.weight_format"]
    source = open_source(write(tmp_path, tensors))
    assert set(source.tensors) == {"a.weight"}
    expected = load().int8_vectorwise_dequant(tensors["a.weight"], tensors["a.SCB"])
    assert torch.equal(source.read("a.weight"), expected)
    assert torch.equal(source.read_rows("a.weight", 7, 31), expected[7:31])
    assert source.info("a.weight").dtype == torch.float32


def test_what_is_not_packed_is_read_as_it_is(tmp_path: Path) -> None:
    plain = {"norm.weight": random(64), "experts": random(3, 8, 64)}
    tensors = plain | packed("a.weight", random(32, 64), quant_type="nf4")
    source = open_source(write(tmp_path, tensors))
    assert set(source.tensors) == {"a.weight", *plain}
    for name, tensor in plain.items():
        assert torch.equal(source.read(name), tensor)
    assert torch.equal(source.read_slice("experts", 1), plain["experts"][1])
    assert torch.equal(source.read_rows("experts", 1, 3), plain["experts"][1:])


def test_a_plain_checkpoint_is_opened_plainly(tmp_path: Path) -> None:
    assert type(open_source(write(tmp_path, {"a.weight": random(4, 4)}))) is Checkpoint


def test_blocks_of_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter reads some rows at a time: together they are the tensor."""
    monkeypatch.setattr("quant.items._BLOCK_NBYTES", 5000)
    tensors = packed("a.weight", random(90, 96), quant_type="nf4", compress_statistics=True)
    source = open_source(write(tmp_path, tensors))
    blocks = list(SliceReader(source).blocks(TensorSlice("a.weight")))
    assert len(blocks) == 4
    assert torch.equal(torch.cat(blocks), library_values(tensors, "a.weight"))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("form", ["nf4-double", "llm-int8"])
def test_conversion(tmp_path: Path, form: str, fused: bool) -> None:
    """Attention packed, and experts where they are Linears; fused ones stay in 16 bits."""
    weights = random_weights(fused)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            tensors[name], values[name] = weight, weight
        elif form == "llm-int8":
            parts = packed_in_8_bits(name, weight)
            scb = parts[name.removesuffix("weight") + "SCB"]
            values[name] = load().int8_vectorwise_dequant(parts[name], scb)
            tensors |= parts
        else:
            tensors |= packed(name, weight, **FORMATS[form])
            values[name] = library_values(tensors, name)
    write_source(tmp_path / "packed", tensors, num_files=2)
    source = open_source(tmp_path / "packed")
    assert isinstance(source, PackedCheckpoint)
    result = convert(make_job(source, tmp_path / "out", fused))
    plain = write_source(tmp_path / "plain", values)
    expected = convert(make_job(plain, tmp_path / "expected", fused))
    written, wanted = (QuantizedCheckpoint.open(r.out).checkpoint for r in (result, expected))
    assert set(written.tensors) == set(wanted.tensors)
    for name in wanted.tensors:
        assert torch.equal(written.read(name), wanted.read(name)), name
    assert result.source_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    found = QuantizedCheckpoint.open(result.out).dense("layers.0.q_proj.weight")
    assert isinstance(found, QuantizedWeight)
    again = quantize(values["layers.0.q_proj.weight"], QuantScheme(8, 64))
    assert torch.equal(dequantize(found), dequantize(again))


def _changed_state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "a.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _replaced(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def _removed(name: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return remove


STATE = "a.weight.quant_state.bitsandbytes__nf4"
FAULTS = {
    "no weight": (_removed("a.weight"), "lacks `a.weight`"),
    "no absmax": (_removed("a.weight.absmax"), "lacks `a.weight.absmax`"),
    "no map": (_removed("a.weight.nested_quant_map"), "lacks `a.weight.nested_quant_map`"),
    "no nested": (_removed("a.weight.nested_absmax"), "lacks `a.weight.nested_absmax`"),
    "short": (_replaced("a.weight", torch.zeros(100, 1, dtype=torch.uint8)), "does not hold 2048"),
    "flat": (_replaced("a.weight", torch.zeros(1024, dtype=torch.uint8)), "does not hold 2048"),
    "scales": (
        _replaced("a.weight.absmax", torch.zeros(31, dtype=torch.uint8)),
        "is not 32 of torch.uint8",
    ),
    "float scales": (_replaced("a.weight.absmax", torch.zeros(32)), "is not 32 of torch.uint8"),
    "no JSON": (_replaced(STATE, torch.tensor([1, 2], dtype=torch.uint8)), f"`{STATE}` is no"),
    "negative byte": (_replaced(STATE, torch.tensor([-1])), f"`{STATE}` is no"),
    "a list": (_replaced(STATE, torch.tensor([91, 93], dtype=torch.uint8)), f"`{STATE}` is no"),
    "type": (_changed_state(quant_type="af4"), f"`{STATE}` is no"),
    "dtype": (_changed_state(dtype="int8"), f"`{STATE}` is no"),
    "blocks": (_changed_state(blocksize=63), f"`{STATE}` is no"),
    "shape": (_changed_state(shape=[32, "64"]), f"`{STATE}` is no"),
    "negative": (_changed_state(shape=[-32, -64]), f"`{STATE}` is no"),
    "no shape": (_changed_state(shape=None), f"`{STATE}` is no"),
    "nested blocks": (_changed_state(nested_blocksize=0), f"`{STATE}` is no"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_four_bits(tmp_path: Path, fault: str) -> None:
    tensors = packed("a.weight", random(32, 64), quant_type="nf4", compress_statistics=True)
    damage, message = FAULTS[fault]
    damage(tensors)
    with pytest.raises(QuantError) as caught:
        open_source(write(tmp_path, tensors))
    assert message in caught.value.message
    assert caught.value.hint == "the checkpoint is incomplete or damaged; download it again"


def test_damaged_eight_bits(tmp_path: Path) -> None:
    whole = packed_in_8_bits("a.weight", random(32, 64))
    for number, (name, tensor, message) in enumerate(
        [
            ("a.SCB", torch.ones(31), "no scale a row"),
            ("a.weight", random(32, 64), "no int8 matrix"),
            ("a.weight_format", torch.tensor(2, dtype=torch.uint8), "order of an old GPU"),
        ]
    ):
        with pytest.raises(QuantError, match=message):
            open_source(write(tmp_path / str(number), whole | {name: tensor}))
    del whole["a.weight"]
    with pytest.raises(QuantError, match=r"lacks `a\.weight`"):
        open_source(write(tmp_path, whole))
