"""Which models of the library are taken, which are refused and why; nothing here computes."""

import json
from typing import Any

import pytest
import torch

from moecli.errors import MoecliError
from moecli.models import facts
from moecli.models.config import ModelSpec
from moecli.models.hf.cache import HfCache, RoomyLayer
from moecli.models.hf.library import build, experts_modules
from moecli.models.hf.probing import Names, expert_items
from moecli.models.hf.spec import HfSpec
from tests.models import library_families as families


def config_of(model_type: str, **changes: object) -> dict[str, Any]:
    """The config.json of the library's defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: dict[str, Any] = json.loads(CONFIG_MAPPING[model_type](**changes).to_json_string())
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "longcat_flash", "num_experts": 4}, "some of its experts are the identity"),
        ({"model_type": "nemotron_h", "n_routed_experts": 4}, "its experts have no gate"),
        ({"model_type": "switch_transformers", "num_experts": 4}, "has an encoder"),
        ({"model_type": "llama4_text", "num_local_experts": 4}, "common interface"),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4}}, "cannot build"),
        ({"model_type": "brandnew", "num_experts": 4}, "knows the model type `brandnew`"),
        ({"model_type": "gpt_oss", "num_local_experts": 4}, "they have biases"),
        ({"model_type": "olmoe", "num_experts": 4, "hidden_size": "wide"}, "cannot read this"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(MoecliError, match=reason) as refused:
        HfSpec.of(config)
    assert refused.value.hint


def test_code_of_a_checkpoint_is_not_run() -> None:
    config = {"model_type": "own", "num_experts": 4, "auto_map": {"AutoModel": "modeling.Own"}}
    with pytest.raises(MoecliError, match="`own`") as refused:
        HfSpec.of(config)
    assert "runs no code" in str(refused.value.hint)


def test_our_own_decoder_comes_first_and_dense_models_stay_refused() -> None:
    own = config_of("qwen3_moe") | {"architectures": ["Qwen3MoeForCausalLM"]}
    assert isinstance(facts.read_facts(own), ModelSpec)
    assert isinstance(facts.read_facts(config_of("olmoe")), HfSpec)
    with pytest.raises(MoecliError, match="dense model"):
        facts.read_facts({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


@pytest.mark.parametrize(
    ("model_type", "changes", "total", "active", "layers"),
    [  # numbers of parameters as they are published, or as the library counts them
        ("olmoe", {"intermediate_size": 1024}, 6_919_161_856, 1_282_017_280, 16),
        ("qwen2_moe", {}, 14_315_784_192, 2_689_173_504, 24),
    ],
)
def test_released_models_have_their_number_of_parameters(
    model_type: str, changes: dict[str, Any], total: int, active: int, layers: int
) -> None:
    spec = HfSpec.of(config_of(model_type, **changes))
    assert (spec.num_params, spec.num_active_params) == (total, active)
    assert (spec.num_layers, len(spec.moe_layers)) == (layers, layers)


def test_caches_are_planned_from_what_the_library_keeps() -> None:
    """Full layers keep all, windows what fits besides what is read at once, states stay."""
    size = 2 * 2 * 16 * 4  # keys and values of two heads in fp32
    full = HfSpec.of(families.tiny_model("olmoe").config.to_dict())
    assert full.cache_nbytes(100, 10) == 4 * 100 * size
    config = families.tiny_model("mimo_v2_flash").config
    sliding = HfSpec.of(config.to_dict())
    assert sliding.cache_nbytes(400, 10) < 0.5 * HfSpec.of(
        config.to_dict() | {"layer_types": ["full_attention"] * 4}
    ).cache_nbytes(400, 10)
    states = HfSpec.of(families.tiny_model("qwen3_next").config.to_dict())
    assert states.recurrent
    assert states.chunk_size(400, 10) == 400
    assert states.cache_nbytes(400, 10) - states.cache_nbytes(300, 10) == 2 * 100 * size


@pytest.mark.parametrize("family", ["aria_text", "deepseek_v4", "kimi_linear", "granitemoe"])
def test_slices_of_a_checkpoint_are_what_the_library_makes_experts_of(family: str) -> None:
    """Fused and transposed ones, and three linears an expert by names of the family's own."""
    model: Any = families.tiny_model(family)
    from transformers.core_model_loading import revert_weight_conversion

    source = revert_weight_conversion(model, model.state_dict())
    meta = build(model.config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    modules = experts_modules(meta)
    by_layer = {module.layer: module for module in modules}

    def matrix(part: Any) -> torch.Tensor:
        tensor = source[part.name] if part.index is None else source[part.name][part.index]
        tensor = tensor.t() if part.transpose else tensor
        return tensor if part.rows is None else tensor[slice(*part.rows)]

    items = expert_items(Names(meta, shapes), shapes, modules)
    assert len(items) == 8 * len(modules)
    for item in items:
        module = by_layer[item.layer]
        up, down = (model.get_parameter(name)[item.expert] for name in module.parameters)
        if module.transposed:
            up, down = up.t(), down.t()
        assert torch.equal(torch.cat([matrix(item.gate), matrix(item.up)]), up)
        assert torch.equal(matrix(item.down), down)


def test_a_checkpoint_without_an_expert_is_refused_by_the_name_of_what_is_missing() -> None:
    model: Any = families.tiny_model("olmoe")
    meta = build(model.config.to_dict())
    with pytest.raises(MoecliError, match=r"becomes `model.layers.0.mlp.experts.gate_up_proj`"):
        expert_items(Names(meta, {}), {}, experts_modules(meta))


def test_a_roomy_layer_is_a_dynamic_layer_that_does_not_copy() -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    library, plain = DynamicCache(), DynamicLayer()
    cache = HfCache(20)
    for index, count in enumerate((3, 1, 4)):
        keys, values = torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 6)
        start = cache.length
        cache.begin(start, count)
        if index == 1:
            assert isinstance(library.layers[0], RoomyLayer)
            where = library.layers[0].keys.data_ptr()
        found, want = library.update(keys, values, 0), plain.update(keys, values)
        assert all(map(torch.equal, found, want))
        cache.commit(library, start + count)
    assert library.layers[0].keys.data_ptr() == where
    assert cache.nbytes == 20 * 2 * (8 + 6) * 4
    assert cache.truncate(5) == 5
    plain.crop(-3)
    assert torch.equal(library.layers[0].values, plain.values)
