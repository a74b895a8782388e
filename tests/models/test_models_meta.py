"""Released models at full size, built by transformers on accelerate's meta device: no memory."""

from typing import Any

import pytest
import torch
from test_models_config import changed

from moecli.models.config import ModelSpec
from moecli.models.naming import plan_conversion
from quant.scheme import QuantScheme
from tests.models.families import FAMILIES
from tests.models.released import MAVERICK, QWEN3, SCOUT_TEXT
from tests.models.tiny_models import num_weights, stored_tensors

TEXT_ONLY = SCOUT_TEXT | {"architectures": ["Llama4ForCausalLM"]}
CONFIGS = {
    **{name: config for family in FAMILIES.values() for name, config in family.released.items()},
    "scout-text": TEXT_ONLY,
    "qwen3-tied": QWEN3 | {"tie_word_embeddings": True, "attention_bias": True},
    "qwen3-mixed": QWEN3 | {"mlp_only_layers": [0, 5], "decoder_sparse_step": 2},
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
