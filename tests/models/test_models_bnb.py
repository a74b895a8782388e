"""bitsandbytes at both ends: checkpoints that transformers saved with it, and runs with it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import decoder_of, oracle, spec_of, tokens
from torch import Tensor

from moecli.conversion import quantize_model
from moecli.dense import bnb_dense_nbytes, bnb_linears
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.hf_config import source_scheme
from moecli.models.moe import FloatExperts
from moecli.models.naming import dense_loader
from quant.bnb import BnbWeight, load
from quant.checkpoint import QuantizedCheckpoint
from quant.errors import QuantError
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

SIZES = {"llama4": {"intermediate_size": 32}, "qwen3_moe": {"moe_intermediate_size": 32}}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "llm-int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=sorted(SIZES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family) / "original"
    oracle(family, **SIZES[family]).bfloat16().save_pretrained(path)
    return path


def saved_by_transformers(original: Path, form: str) -> tuple[Path, torch.nn.Module]:
    """The checkpoint that transformers saves when it has loaded one with bitsandbytes."""
    import transformers

    load()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        original,
        quantization_config=transformers.BitsAndBytesConfig(**FORMATS[form]),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    path = original.with_name(form)
    model.save_pretrained(path)
    return path, model


def library_values(module: torch.nn.Module) -> Tensor:
    """What the weight of a Linear4bit or Linear8bitLt stands for; plain ones as they are."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:  # as one row: the library errs with several on some CPUs
        shape, state.shape = state.shape, torch.Size([math.prod(state.shape)])
        return load().dequantize_4bit(weight.data, state).view(shape)
    if getattr(weight, "SCB", None) is not None:
        return load().int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.data


@pytest.mark.parametrize("form", FORMATS)
def test_checkpoints_of_transformers_are_quantized(
    original: Path, family: str, form: str, tmp_path: Path
) -> None:
    path, model = saved_by_transformers(original, form)
    scheme, dense_scheme = QuantScheme(8, 32), QuantScheme(8, 32)
    result = quantize_model(path, tmp_path / "out", scheme, dense_scheme)
    written = QuantizedCheckpoint.open(result.out)
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "router" not in name and "mlp.gate" not in name
    ]
    assert sum(hasattr(module, "source_cls") for _, module in linears) == len(linears) - 1  # head
    for name, module in linears:
        found = written.dense(f"{name}.weight")
        assert isinstance(found, QuantizedWeight), name
        expected = quantize(library_values(module), dense_scheme)
        assert torch.equal(dequantize(found), dequantize(expected)), name
    plain = quantize_model(original, tmp_path / "plain", scheme, dense_scheme)
    expected_experts = QuantizedCheckpoint.open(plain.out)
    for layer in written.layers:
        for expert in range(written.num_experts(layer)):
            spans = [w.expert_span(layer, expert) for w in (written, expected_experts)]
            blobs = [file.read_bytes()[at : at + size] for file, at, size in spans]
            assert blobs[0] == blobs[1], "experts are 16 bits in both"
    assert written.config == json.loads((plain.out / "config.json").read_text())
    assert written.config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_quantization_leaks_from_no_part_of_a_config(original: Path, tmp_path: Path) -> None:
    path, _ = saved_by_transformers(original, "nf4")
    config = json.loads((path / "config.json").read_text())
    config["some_config"] = {"quantization_config": config["quantization_config"], "kept": 1}
    (path / "config.json").write_text(json.dumps(config))
    result = quantize_model(path, tmp_path / "out", QuantScheme(4, 32), None)
    text = (result.out / "config.json").read_text()
    assert json.loads(text)["some_config"] == {"kept": 1}
    assert "bnb" not in text
    assert "load_in" not in text


@pytest.mark.parametrize("quantization", [{"quant_method": "hqq"}, "hqq"], ids=str)
def test_other_quantized_sources_are_refused(
    original: Path, tmp_path: Path, quantization: Any
) -> None:
    config = json.loads((original / "config.json").read_text())
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").symlink_to(original / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(QuantError, match="is quantized with `hqq`, which is not read") as caught:
        quantize_model(source, tmp_path / "out", QuantScheme(4, 32), None)
    assert "bitsandbytes (NF4, FP4, LLM.int8)" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, None),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes llm-int8"),
        ({"_load_in_4bit": True}, "bitsandbytes fp4"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "bitsandbytes nf4, double quantization",
        ),
    ],
)
def test_what_a_source_says_of_itself(quantization: Any, expected: str | None) -> None:
    config = {"a": 1} if quantization is None else {"quantization_config": quantization}
    assert source_scheme(config) == expected


def loader(model: torch.nn.Module, scheme: QuantScheme | None) -> Callable[[str], Any]:
    """Dense weights of a model, as a file of ours would give them."""
    spec = spec_of(model)
    linears = {tensor.name for tensor in spec.dense_tensors if tensor.linear}
    read = dense_loader(spec, dict(model.state_dict()), model.state_dict().__getitem__)

    def weights(name: str) -> Any:
        tensor = read(name)
        return quantize(tensor, scheme) if scheme and name in linears else tensor

    return weights


@pytest.mark.parametrize("stored", [None, QuantScheme(8, 32)], ids=str)
@pytest.mark.parametrize("scheme", ["nf4", "llm-int8"])
def test_a_decoder_with_linears_of_bitsandbytes(
    family: str, scheme: Any, stored: QuantScheme | None
) -> None:
    """Its logits are those of the weights that bitsandbytes has made of the stored ones."""
    model = oracle(family, **SIZES[family], intermediate_size_mlp=64)
    spec = spec_of(model)
    weights = bnb_linears(spec, loader(model, stored), scheme, "cpu")
    made = {tensor.name: weights(tensor.name) for tensor in spec.dense_tensors}
    kinds = {name: isinstance(weight, BnbWeight) for name, weight in made.items()}
    assert kinds == {tensor.name: tensor.linear for tensor in spec.dense_tensors}
    assert bnb_dense_nbytes(spec, scheme) == sum(
        weight.nbytes for weight in made.values() if isinstance(weight, BnbWeight)
    )
    experts = decoder_of(model).layers[spec.moe_layers[0]].mlp.experts
    assert isinstance(experts, FloatExperts)

    def logits(dense: Callable[[str], Any]) -> Tensor:
        decoder = Decoder(spec, dense, experts)
        cache = KvCache(spec, 12, torch.float32)
        return decoder.forward(Batch.of(tokens(12), cache, all_logits=True))

    def values(name: str) -> Any:
        weight = made[name]
        return weight.dequantize() if isinstance(weight, BnbWeight) else weight

    got, expected = logits(made.__getitem__), logits(values)
    if scheme == "nf4":
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:  # activations have 8 bits too
        assert (got - expected).norm() < 0.1 * expected.norm()
