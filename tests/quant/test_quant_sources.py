"""Checkpoints that are quantized already, read as if they were not: every format, every value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_formats import PACKINGS, Tensors, gptq
from quant_sources import make_job, random_weights, write_source
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.errors import QuantError
from quant.items import SliceReader, TensorSlice
from quant.job import ConversionJob
from quant.pack_quantized import quantization_config
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from quant.sources.opening import open_source
from quant.tensor import QuantizedWeight

SHAPE = (96, 128)


def write(path: Path, tensors: Tensors, said: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "test", "quantization_config": said}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("form", PACKINGS)
def test_values_are_those_of_the_library(tmp_path: Path, form: str) -> None:
    packing = PACKINGS[form]
    tensors, values = packing.pack("a.q_proj", SHAPE, 0)
    plain = torch.randn(16).bfloat16()
    source = open_source(write(tmp_path, tensors | {"a.norm.weight": plain}, packing.config))
    assert set(source.tensors) == {"a.q_proj.weight", "a.norm.weight"}
    info = source.info("a.q_proj.weight")
    assert (info.dtype, info.shape) == (values.dtype, SHAPE)
    assert info.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(source.read("a.q_proj.weight"), values)
    assert torch.equal(source.read_slice("a.q_proj.weight", 5), values[5])
    assert torch.equal(source.read("a.norm.weight"), plain)
    assert source.form


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(PACKINGS)), st.integers(2, 9), st.integers(1, 5), st.data())
def test_any_rows(tmp_path: Path, form: str, rows: int, columns: int, data: st.DataObject) -> None:
    shape = (8 * rows, 64 * columns)
    tensors, values = PACKINGS[form].pack("a", shape, rows)
    source = open_source(write(tmp_path, tensors, PACKINGS[form].config))
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    assert torch.equal(source.read_rows("a.weight", start, stop), values[start:stop])


@pytest.mark.parametrize("form", PACKINGS)
def test_blocks_of_a_large_tensor(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter reads some rows at a time: together they are the tensor."""
    monkeypatch.setattr("quant.items._BLOCK_NBYTES", 5000)
    tensors, values = PACKINGS[form].pack("a", SHAPE, 3)
    source = open_source(write(tmp_path, tensors, PACKINGS[form].config))
    blocks = list(SliceReader(source).blocks(TensorSlice("a.weight")))
    assert len(blocks) > 4
    assert torch.equal(torch.cat(blocks), values)


def packed_model(form: str) -> tuple[Tensors, Tensors]:
    """A model with every projection packed, and the one of floats that it stands for."""
    tensors: Tensors = {}
    values: Tensors = {}
    for number, (name, weight) in enumerate(random_weights(False).items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = values[name] = weight
            continue
        shape = (weight.shape[0], weight.shape[1])
        parts, values[name] = PACKINGS[form].pack(name.removesuffix(".weight"), shape, number)
        tensors |= parts
    return tensors, values


def sorted_job(source: Checkpoint, out: Path) -> ConversionJob:
    """Whose dense tensors are in the order of their names, not in that of the files."""
    job = make_job(source, out, False)
    return replace(job, dense=tuple(sorted(job.dense, key=lambda item: item.source.name)))


@pytest.mark.parametrize("form", PACKINGS)
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_packed_model_becomes_what_its_floats_become(
    tmp_path: Path, form: str, num_files: int
) -> None:
    """Wherever the parts of a weight lie: with three files they are scattered."""
    tensors, values = packed_model(form)
    write_source(tmp_path / "packed", tensors, num_files)
    config = {"model_type": "test", "quantization_config": PACKINGS[form].config}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path / "packed")
    result = convert(sorted_job(source, tmp_path / "out"))
    plain = write_source(tmp_path / "plain", values)
    expected = convert(sorted_job(plain, tmp_path / "expected"))
    found, wanted = ((r.out / "model.safetensors").read_bytes() for r in (result, expected))
    assert found == wanted
    assert result.source_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.source_form == source.form


def test_what_moecli_has_written_is_quantized_again(tmp_path: Path) -> None:
    """INT8 to INT4: the same as from the values that INT8 stands for. Fillers do not add up."""
    plain = write_source(tmp_path / "plain", random_weights(False))
    int8, int4 = QuantScheme(8, 32), QuantScheme(4, 32)
    first = convert(make_job(plain, tmp_path / "int8", False, int8, QuantScheme(8, 64)))
    said = quantization_config(
        int8, QuantScheme(8, 64), [], [r"re:.*\.experts\..*_proj$"]
    )  # fmt: skip
    config = {"model_type": "test", "quantization_config": said}
    (first.out / "config.json").write_text(json.dumps(config))
    source = open_source(first.out)
    assert set(source.tensors) == set(plain.tensors)
    assert source.form == "compressed-tensors INT8"
    values: Tensors = {name: source.read(name) for name in source.tensors}
    for name in ("layers.0.experts.1.up_proj.weight", "layers.1.q_proj.weight"):
        scheme = int8 if ".experts." in name else QuantScheme(8, 64)
        again = dequantize(quantize(plain.read(name), scheme), torch.bfloat16)
        assert torch.equal(values[name], again)
    result = convert(make_job(source, tmp_path / "int4", False, int4))
    floats = write_source(tmp_path / "floats", values)
    expected = convert(make_job(floats, tmp_path / "expected", False, int4))
    found, wanted = ((r.out / "model.safetensors").read_bytes() for r in (result, expected))
    assert found == wanted
    dense = QuantizedCheckpoint.open(result.out).dense("layers.0.q_proj")
    assert isinstance(dense, QuantizedWeight)


def test_groups_of_a_config_go_by_name_before_class(tmp_path: Path) -> None:
    """As moecli writes them: INT4 experts in groups of 64 and INT8 in groups of 32 have words and
    scales of the same shapes.
    """
    experts = PACKINGS["int4"].pack
    said = dict(PACKINGS["int8-asymmetric"].config)
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 32}
    groups = {"group_0": {"targets": [r"re:.*\.experts\..*_proj$"], "weights": int4}}
    said["config_groups"] = {"group_9": said["config_groups"]["group_0"]} | groups
    tensors, expected = experts("m.experts.0.up_proj", (8, 64), 0)
    others, values = PACKINGS["int8-asymmetric"].pack("m.q_proj", (8, 64), 0)
    source = open_source(write(tmp_path, tensors | others, said))
    assert torch.equal(source.read("m.experts.0.up_proj.weight"), expected)
    assert torch.equal(source.read("m.q_proj.weight"), values)
    assert source.form == "compressed-tensors INT4 and INT8"


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    tensors, values = PACKINGS["fp8-channel"].pack("a", SHAPE, 0)
    tensors["a.input_scale"] = torch.ones(1)
    source = open_source(write(tmp_path, tensors, PACKINGS["fp8-channel"].config))
    assert set(source.tensors) == {"a.weight"}
    assert torch.equal(source.read("a.weight"), values)


@pytest.mark.parametrize("shape", [(2, 6, 64), (3, 16, 32)])
def test_mxfp4_is_that_of_transformers(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator)
    scales = torch.randint(100, 140, (experts, rows, columns // 32), generator=generator)
    blocks, scales = blocks.to(torch.uint8), scales.to(torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.randn(experts, rows).bfloat16()
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias}
    source = open_source(write(tmp_path, tensors, {"quant_method": "mxfp4"}))
    expected = convert_moe_packed_tensors(blocks, scales)
    assert set(source.tensors) == {name, f"{name}_bias"}
    assert source.info(name).shape == (experts, columns, rows)
    assert torch.equal(source.read(name), expected)
    assert torch.equal(source.read_slice(name, 1), expected[1])
    part = TensorSlice(name, 1, True, (0, rows // 2))
    found = torch.cat(list(SliceReader(source).blocks(part)))
    assert torch.equal(found, expected[1].t()[: rows // 2])
    assert source.form == "MXFP4"


def test_whole_blocks_of_fp8_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, _ = PACKINGS["fp8-block"].pack("a", (256, 384), 0)
    op = Fp8Dequantize(None)
    expected = op._dequantize_one(
        tensors["a.weight"], tensors["a.weight_scale_inv"], torch.bfloat16
    )
    source = open_source(write(tmp_path, tensors, PACKINGS["fp8-block"].config))
    assert torch.equal(source.read("a.weight"), expected)


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ({"quant_method": "hqq"}, "is quantized with `hqq`, which is not read", "FP8"),
        ("odd", "is quantized with `odd`, which is not read", "GPTQ"),
        ({"quant_method": "awq"}, "weights are `awq`, and none", "do not belong together"),
        ({}, "weights are `bitsandbytes`, and none", "do not belong together"),
        ({"quant_method": "awq", "version": "gemv"}, "packed for `gemv`", "`gemm` of 4 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "for `marlin`", "gptq_v2"),
        ({"quant_method": "compressed-tensors"}, "make no sense", "download it again"),
        (
            {**PACKINGS["int4"].config, "format": "nvfp4-pack-quantized"},
            "compressed-tensors `nvfp4-pack-quantized`",
            "pack-quantized, float-quantized",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_read_is_told_with_what_is(
    tmp_path: Path, said: Any, message: str, hint: str
) -> None:
    with pytest.raises(QuantError) as caught:
        open_source(write(tmp_path, {"a.weight": torch.ones(4, 4)}, said))
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_other_bits_are_told(tmp_path: Path) -> None:
    said = json.loads(json.dumps(PACKINGS["int4"].config))
    tensors, _ = PACKINGS["int4"].pack("a", SHAPE, 0)
    said["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    with pytest.raises(QuantError, match="integers of 3 bits"):
        open_source(write(tmp_path / "words", tensors, said))
    tensors, _ = gptq(4, False).pack("a", SHAPE, 0)
    tensors["a.qzeros"] = torch.zeros(4, 6, dtype=torch.int32)
    with pytest.raises(QuantError, match="GPTQ weights of 2 bits"):
        open_source(write(tmp_path / "gptq", tensors, PACKINGS["gptq"].config))


DAMAGES: list[tuple[str, str, Tensor | None]] = [
    ("gptq", "a.scales", None),
    ("gptq", "a.qzeros", None),
    ("gptq", "a.g_idx", torch.zeros(3, dtype=torch.int32)),
    ("gptq", "a.qweight", torch.zeros(5, 96, dtype=torch.int32)),
    ("gptq", "a.scales", torch.zeros(4, 90, dtype=torch.float16)),
    ("awq", "a.qzeros", torch.zeros(4, 11, dtype=torch.int32)),
    ("awq", "a.qzeros", None),
    ("fp8-block", "a.weight", None),
    ("fp8-block", "a.weight", torch.zeros(96, 128)),
    ("fp8-block", "a.weight_scale_inv", torch.ones(3, 3)),
    ("fp8-block", "a.weight_scale_inv", torch.ones(1, 1, dtype=torch.int32)),
    ("int4", "a.weight_scale", None),
    ("int4", "a.weight_scale", torch.ones(96, 5)),
    ("int4", "a.weight_scale", torch.ones(90, 4)),
    ("int4", "a.weight_packed", torch.zeros(96, 16)),
    ("int4-asymmetric", "a.weight_zero_point", torch.zeros(11, 4, dtype=torch.int32)),
    ("int8-naive", "a.weight_zero_point", torch.zeros(95, 1, dtype=torch.int8)),
]


@pytest.mark.parametrize(
    ("form", "name", "tensor"), DAMAGES, ids=[f"{n}-{d[0]}-{d[1]}" for n, d in enumerate(DAMAGES)]
)
def test_damage_is_told_before_anything_is_converted(
    tmp_path: Path, form: str, name: str, tensor: Tensor | None
) -> None:
    tensors, _ = PACKINGS[form].pack("a", SHAPE, 0)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(QuantError) as caught:
        open_source(write(tmp_path, tensors, PACKINGS[form].config))
    assert "`a." in caught.value.message
    assert caught.value.hint


def test_groups_that_do_not_exist_are_told(tmp_path: Path) -> None:
    tensors, _ = PACKINGS["gptq-act-order"].pack("a", SHAPE, 0)
    tensors["a.g_idx"][3] = 4
    source = open_source(write(tmp_path, tensors, PACKINGS["gptq-act-order"].config))
    with pytest.raises(QuantError, match="groups beyond 0 to 3"):
        source.read("a.weight")


def test_a_plain_checkpoint_is_opened_plainly(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, {"a.weight": torch.ones(4, 4)}, None))
    assert type(source) is Checkpoint
    assert source.form == ""
