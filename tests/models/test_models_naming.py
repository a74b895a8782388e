"""Names and shapes of checkpoints: fused or not, under any prefix; what is written loads."""

import re
from pathlib import Path

import pytest
import torch

from moecli.errors import MoecliError
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.moe import FloatExperts, expert_biases
from moecli.models.naming import CheckpointNames, dense_loader, plan_conversion
from quant import ops
from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.items import PROJECTIONS, TensorSlice
from quant.job import ConversionJob
from quant.pack_quantized import quantization_config
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from tests.models.dequantized import dequantized
from tests.models.families import FAMILIES
from tests.models.tiny_models import (
    decoder_of,
    expected_logits,
    logits_in_steps,
    oracle,
    spec_of,
    tokens,
)

INT4, INT8 = QuantScheme(4, 32), QuantScheme(8, 32)
SOURCES = {name: (name, family.wide) for name, family in FAMILIES.items()}
SOURCES["llama4_interleaved"] = (
    "llama4",
    FAMILIES["llama4"].wide | {"interleave_moe_layer_step": 2, "tie_word_embeddings": True},
)


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def unfused(model):
    """The tensors of a model with its experts one Linear each, as quantizing tools write them."""
    found, family = {}, model.config.model_type.removesuffix("_text")
    for name, tensor in model.state_dict().items():
        if family == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        module, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        tensor = tensor.mT if family in ("llama4", "gpt_oss") else tensor  # [E, out, in]
        for expert, weight in enumerate(tensor):
            halves = (weight[0::2], weight[1::2]) if family == "gpt_oss" else weight.chunk(2)
            parts = halves if last == "gate_up_proj" else [weight]
            names = ("w1", "w3", "w2") if family == "mixtral" else PROJECTIONS
            names = names[:2] if last == "gate_up_proj" else names[2:]
            for part, rows in zip(names, parts, strict=True):
                found[f"{module}.{expert}.{part}.weight"] = rows
    return found


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prefix_and_layout_gives_the_same_model(family, fused, prefix):
    """Names stay under the prefix of the source, experts become one Linear each."""
    model = oracle(family)
    tensors = dict(model.state_dict()) if fused else unfused(model)
    head = "language_model." if prefix == "language_model.model." else ""
    tensors = {
        head + name if name.startswith("lm_head") else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    plan = plan_conversion(spec_of(model), {name: t.shape for name, t in tensors.items()}, INT8)
    block = "feed_forward" if family == "llama4" else "mlp"
    block = "block_sparse_moe" if family == "mixtral" and not fused else block
    assert (
        plan.experts[1].prefix == f"{prefix}layers.{spec_of(model).moe_layers[0]}.{block}.experts.1"
    )
    names = {item.name for item in plan.dense}
    assert f"{prefix}layers.1.self_attn.o_proj" in names
    assert f"{prefix}norm.weight" in names
    assert head + "lm_head" in names
    assert len(names) == len(plan.dense) == len(model_dense(model))
    found = logits_in_steps(decoder_of(model, tensors=tensors), tokens(20), [20])
    assert (found - expected_logits(model, tokens(20))).abs().max() <= 1e-5


def model_dense(model):
    experts = (".experts.gate_up_proj", ".experts.down_proj")
    return [name for name in model.state_dict() if not name.endswith(experts)]


def test_fused_slices():
    """Llama 4 stores [in, out], so gate and up are halves of its columns; Qwen3 [out, in]."""
    spec = spec_of(model := oracle("llama4"))
    item = plan_conversion(spec, shapes_of(model)).experts[-1]
    base = "model.layers.3.feed_forward.experts."
    assert (item.layer, item.expert) == (3, 3)
    assert item.gate == TensorSlice(base + "gate_up_proj", 3, True, (0, 24))
    assert item.up == TensorSlice(base + "gate_up_proj", 3, True, (24, 48))
    assert item.down == TensorSlice(base + "down_proj", 3, True, None)
    spec = spec_of(model := oracle("qwen3_moe"))
    item = plan_conversion(spec, shapes_of(model)).experts[0]
    assert item.up == TensorSlice("model.layers.0.mlp.experts.gate_up_proj", 0, False, (24, 48))


def test_which_tensors_are_quantized():
    spec = spec_of(model := oracle("llama4", interleave_moe_layer_step=2, attention_bias=True))
    plan = plan_conversion(spec, shapes_of(model), INT8)
    kept = {item.name for item in plan.dense if item.scheme is None}
    words = {name.removesuffix(".weight").rpartition(".")[2] for name in kept}
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}
    assert words == norms | {"bias", "router", "embed_tokens"}
    assert all(item.scheme == INT8 for item in plan.dense if item.name not in kept)
    assert {item.scheme for item in plan_conversion(spec, shapes_of(model)).dense} == {None}


def test_a_stored_copy_of_a_tied_head_is_dropped():
    spec = spec_of(model := oracle("qwen3_moe", tie_word_embeddings=True))
    assert "lm_head.weight" in shapes_of(model)
    plan = plan_conversion(spec, shapes_of(model), INT8)
    assert not [item for item in plan.dense if "lm_head" in item.name]
    assert any(re.fullmatch(pattern[3:], "lm_head") for pattern in plan.ignore)


MODULES = {
    "model.layers.0.feed_forward.router",
    "model.layers.0.feed_forward.shared_expert.up_proj",
    "model.layers.1.feed_forward.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "lm_head",
    "vision_model.model.layers.0.mlp.fc1",
    "model.layers.0.feed_forward.experts.3.gate_proj",
}


@pytest.mark.parametrize(
    ("scheme", "quantized"),
    [
        (None, {"model.layers.0.feed_forward.experts.3.gate_proj"}),
        (
            INT8,
            MODULES - {"model.layers.0.feed_forward.router", "vision_model.model.layers.0.mlp.fc1"},
        ),
    ],
)
def test_ignored_modules(scheme, quantized):
    spec = spec_of(model := oracle("llama4", moe_layers=[0, 2]))
    shapes = shapes_of(model) | {"vision_model.model.layers.0.mlp.fc1.weight": (4, 4)}
    patterns = plan_conversion(spec, shapes, scheme).ignore
    assert all(pattern.startswith("re:") for pattern in patterns)
    found = {m for m in MODULES if not any(re.match(p[3:], m) for p in patterns)}
    assert found == quantized


def test_other_tensors_are_kept_as_they_are():
    spec = spec_of(model := oracle("llama4"))
    extra = {"vision_model.class_embedding": (16,), "multi_modal_projector.linear_1.weight": (4, 4)}
    plan = plan_conversion(spec, shapes_of(model) | extra, INT8)
    kept = {item.name: item for item in plan.dense}
    for name in extra:
        assert kept[name].scheme is None
        assert kept[name].source == TensorSlice(name)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layers_that_predict_later_tokens_are_left_out(prefix):
    """They follow the model's own, with names that would pass for theirs."""
    spec = spec_of(model := oracle("qwen3_moe"))
    shapes = {prefix + name.removeprefix("model."): size for name, size in shapes_of(model).items()}
    plain = plan_conversion(spec, shapes, INT8)
    beyond = {prefix + f"layers.{layer}.eh_proj.weight": (32, 64) for layer in (3, 10)}
    beyond[prefix + "layers.3.mlp.experts.gate_up_proj"] = (6, 48, 32)
    plan = plan_conversion(spec, shapes | beyond, INT8)
    assert set(plan.left_out) == set(beyond)
    assert (plan.experts, plan.dense, plan.ignore) == (plain.experts, plain.dense, plain.ignore)
    assert plain.left_out == ()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.feed_forward.experts.down_proj",
        "model.layers.2.feed_forward.router.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_missing_tensors_and_wrong_shapes_are_named(name):
    model = oracle("llama4")
    spec, shapes = spec_of(model), shapes_of(model)
    right = shapes.pop(name)
    with pytest.raises(MoecliError, match=re.escape(name.removeprefix("model."))) as caught:
        plan_conversion(spec, shapes)
    assert caught.value.hint
    wrong = (right[0] + 1, *right[1:])
    with pytest.raises(MoecliError) as caught:
        plan_conversion(spec, shapes | {name: wrong})
    for words in (name, str(list(wrong)), str(list(right))):
        assert words in caught.value.message


def test_missing_unfused_expert_is_named():
    model = oracle("qwen3_moe")
    shapes = {name: tuple(tensor.shape) for name, tensor in unfused(model).items()}
    del shapes["model.layers.2.mlp.experts.5.up_proj.weight"]
    with pytest.raises(MoecliError, match=r"layers\.2\.mlp\.experts\.5\.up_proj\.weight"):
        plan_conversion(spec_of(model), shapes)


def test_the_loader_names_what_is_missing():
    model = oracle("llama4")
    names = [name for name in shapes_of(model) if "layers.2.self_attn.v_proj" not in name]
    weights = dense_loader(spec_of(model), names, lambda name: name)
    assert weights("layers.2.q_proj") == "model.layers.2.self_attn.q_proj.weight"
    with pytest.raises(MoecliError, match=r"layers\.2\.self_attn\.v_proj\.weight"):
        weights("layers.2.v_proj")


BIASED = {name: {"attention_bias": True} for name in ("llama4", "qwen3_moe")}


def test_every_dense_tensor_has_a_name_of_its_own():
    for family in FAMILIES:
        model = oracle(family, **BIASED.get(family, {}))
        names = CheckpointNames(spec_of(model), shapes_of(model))
        found = [names.tensor(tensor.name) for tensor in names.spec.dense_tensors]
        assert sorted(found) == sorted(model_dense(model))


def multimodal():
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vision_output_dim": 24}
    vision |= {"projector_input_dim": 24, "projector_output_dim": 24}
    text = oracle("llama4", **SOURCES["llama4"][1])
    config = Llama4Config(text_config=text.config.to_dict(), vision_config=vision)
    model = Llama4ForConditionalGeneration(config).eval()
    model.language_model.load_state_dict(text.state_dict())
    return model


def cast(model, dtype):
    """Every float parameter; `to` would cast complex buffers, and is refused when quantized."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def quantized(model, directory, dense_scheme):
    """The model saved by transformers, then converted under our names."""
    cast(model, torch.bfloat16).save_pretrained(directory / "source")
    source = Checkpoint.open(directory / "source")
    config = dict(source.config)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    plan = plan_conversion(ModelSpec.from_hf(config), shapes, dense_scheme)
    config["quantization_config"] = quantization_config(
        INT4, dense_scheme, plan.ignore, plan.expert_targets
    )
    job = ConversionJob(
        source, directory / "out", INT4, dense_scheme, plan.experts, plan.dense, config
    )
    convert(job)
    return QuantizedCheckpoint.open(directory / "out")


def decoder_over(checkpoint):
    """Our decoder; experts as transformers expands them: to bf16, or Llama 4's not at all."""
    spec = ModelSpec.from_hf(dict(checkpoint.config))

    def load(layer, expert):
        path, offset, nbytes = checkpoint.expert_span(layer, expert)
        with Path(path).open("rb") as file:
            file.seek(offset)
            blob = torch.frombuffer(bytearray(file.read(nbytes)), dtype=torch.uint8)
        weights = checkpoint.layout.views(blob)
        parts = (weights.gate, weights.up, weights.down)
        if FAMILIES[spec.family].unfused:
            return tuple(dequantize(part).bfloat16() for part in parts)
        return parts

    weights = dense_loader(spec, checkpoint.checkpoint.tensors, checkpoint.dense)
    return Decoder(spec, weights, FloatExperts(spec, load, expert_biases(spec, weights)))


@pytest.mark.parametrize("dense_scheme", [None, INT8, INT4], ids=lambda s: s.name if s else "bf16")
@pytest.mark.parametrize("name", [*SOURCES, "llama4_multimodal"])
def test_what_is_written_loads_in_transformers_with_the_same_logits(name, dense_scheme, tmp_path):
    import transformers

    model = (
        multimodal()
        if name == "llama4_multimodal"
        else oracle(SOURCES[name][0], **SOURCES[name][1])
    )
    checkpoint = quantized(model, tmp_path, dense_scheme)
    ids = tokens(20)
    if name == "llama4_multimodal":
        library = transformers.Llama4ForConditionalGeneration.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        )
        expected = expected_logits(cast(library, torch.float32), ids)
    else:
        expected = expected_logits(dequantized(tmp_path / "out"), ids)
    backend = ops.current_backend()
    ops.set_backend("reference")
    try:
        found = logits_in_steps(decoder_over(checkpoint), ids, [13, 7])
    finally:
        ops.set_backend(backend)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5
    original = expected_logits(cast(model, torch.float32), ids)
    assert (found - original).pow(2).mean().sqrt() < 0.5 * original.std()


def test_a_router_s_correction_is_not_rounded(tmp_path):
    """Experts that are nearly as wanted as each other differ by less than 16 bits hold."""
    model = oracle("glm4_moe", **FAMILIES["glm4_moe"].wide)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = model.state_dict()[name].clone()
    assert not torch.equal(expected, expected.bfloat16().float())
    found = quantized(model, tmp_path, INT8).dense(name)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_rows_of_gate_and_up_that_are_neighbours():
    spec = spec_of(model := oracle("gpt_oss"))
    plan = plan_conversion(spec, shapes_of(model), INT8)
    item, base = plan.experts[-1], "model.layers.3.mlp.experts."
    assert item.gate == TensorSlice(base + "gate_up_proj", 5, True, (0, 48), 2)
    assert item.up == TensorSlice(base + "gate_up_proj", 5, True, (1, 48), 2)
    kept = {item.name for item in plan.dense if item.scheme is None}
    assert {base + "gate_up_proj_bias", base + "down_proj_bias"} <= kept
    assert {"model.layers.0.self_attn.sinks", "model.layers.0.mlp.router.bias"} <= kept
