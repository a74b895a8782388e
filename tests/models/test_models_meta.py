"""Released models at full size, built by transformers on accelerate's meta device: no memory."""

from typing import Any

import pytest
import torch
from test_models_config import MAVERICK, QWEN3, SCOUT, SCOUT_TEXT, changed

from moecli.models.config import ModelSpec
from moecli.models.naming import plan_conversion
from quant.scheme import QuantScheme
from tests.models.released import GLM_4_5_AIR, GPT_OSS_20B, GPT_OSS_120B, MIXTRAL
from tests.models.tiny_models import num_weights, stored_tensors

TEXT_ONLY = SCOUT_TEXT | {"architectures": ["Llama4ForCausalLM"]}
CONFIGS = {
    "scout": SCOUT,
    "scout-text": TEXT_ONLY,
    "maverick": MAVERICK,
    "qwen3": QWEN3,
    "qwen3-tied": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3-mixed": QWEN3 | {"mlp_only_layers": [0, 5], "decoder_sparse_step": 2},
    "mixtral": MIXTRAL,
    "glm-4.5-air": GLM_4_5_AIR,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": GPT_OSS_120B,
    "maverick-every-third": changed(MAVERICK, interleave_moe_layer_step=3),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[ModelSpec, torch.nn.Module]:
    """Our spec of a config, and the library's model of it."""
    import accelerate
    import transformers

    config: dict[str, Any] = CONFIGS[request.param]
    kind = config["architectures"][0]
    # Without `include_buffers` it allocates each parameter before it sends it to the device.
    with accelerate.init_empty_weights(include_buffers=True):
        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
    model.tie_weights()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return ModelSpec.from_hf(config), model


def test_parameters_are_those_of_the_library(pair: tuple[ModelSpec, torch.nn.Module]) -> None:
    spec, model = pair
    assert spec.num_params == num_weights(model)


def test_every_tensor_has_its_place(pair: tuple[ModelSpec, torch.nn.Module]) -> None:
    """A conversion takes each tensor of the library's model once, by its full-size shape."""
    spec, model = pair
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    conversion = plan_conversion(spec, shapes, QuantScheme(8, 128))
    experts = {part.name for item in conversion.experts for part in item.projections.values()}
    dense = [item.source.name for item in conversion.dense]
    assert len(dense) == len(set(dense))
    assert not experts & set(dense)
    assert experts | set(dense) == set(shapes)
    assert len(conversion.experts) == len(spec.moe_layers) * spec.num_experts
    quantized = [item.source.name for item in conversion.dense if item.scheme is not None]
    assert len(quantized) == sum(tensor.linear for tensor in spec.dense_tensors)
    assert not [name for name in quantized if "norm" in name or "embed" in name]
