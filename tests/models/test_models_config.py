"""ModelSpec from config.json: released models, both ways of storing RoPE, and what is refused."""

import json
import math

import pytest
import torch

from moecli.errors import MoecliError
from moecli.models.config import (
    GroupedRouting,
    LayerSpec,
    ModelSpec,
    RopeScaling,
    RopeSpec,
    TemperatureSpec,
    YarnScaling,
)
from moecli.models.rope import inverse_frequencies, magnitude
from tests.models.released import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_4_5_AIR,
    GPT_OSS_20B,
    GPT_OSS_120B,
    MAVERICK,
    MIXTRAL,
    MOONLIGHT,
    QWEN3,
    SCOUT,
    SCOUT_TEXT,
)
from tests.models.tiny_models import num_weights, oracle

RELEASED = {"scout": SCOUT, "maverick": MAVERICK, "qwen3": QWEN3, "mixtral": MIXTRAL}
RELEASED |= {"glm4": GLM_4_5_AIR, "gpt-oss-20b": GPT_OSS_20B}
RELEASED |= {"deepseek-v3": DEEPSEEK_V3, "moonlight": MOONLIGHT}
RELEASED["deepseek-v2-lite"] = DEEPSEEK_V2_LITE


def changed(config, **changes):
    """The config with keys of its text part replaced, or removed where None is given."""
    part = config.get("text_config", config) | changes
    part = {key: value for key, value in part.items() if value is not None}
    return config | {"text_config": part} if "text_config" in config else part


def test_scout():
    spec = ModelSpec.from_hf(SCOUT)
    assert spec.num_params == 108_641_793_536, "the published count, vision tower included"
    assert spec.num_vision_params == 871_932_416
    assert spec.num_text_params == spec.num_params - 871_932_416
    assert round(spec.num_active_params / 1e9) == 17
    assert spec.expert_numel == 125_829_120
    assert spec.moe_layers == tuple(range(48))
    assert spec.layers[2] == LayerSpec("chunked", rope=True, moe=True)
    assert spec.layers[3] == LayerSpec("full", rope=False, moe=True)
    assert sum(layer.rope for layer in spec.layers) == 36
    assert spec.rope == RopeSpec("interleaved", 500000.0, RopeScaling(16.0, 1.0, 1.0, 8192))
    assert spec.temperature == TemperatureSpec(8192, 0.1)
    assert spec.qk_norm == "weightless_after_rope"
    assert spec.weight_on_input
    assert spec.max_context == 10485760


def test_maverick():
    spec = ModelSpec.from_hf(MAVERICK)
    assert spec.num_params == 401_583_781_376
    assert round(spec.num_active_params / 1e9) == 17
    assert spec.moe_layers == tuple(range(1, 48, 2))
    assert spec.dense_intermediate_size == 16384
    assert spec.qk_norm == "none"
    assert spec.rope.scaling is None
    assert spec.temperature == TemperatureSpec(8192, 0.1), "on when the key is absent"


def test_qwen3_30b_a3b():
    spec = ModelSpec.from_hf(QWEN3)
    assert spec.num_params == spec.num_text_params == 30_532_122_624
    assert round(spec.num_active_params / 1e8) == 34
    assert spec.normalize_topk
    assert not spec.weight_on_input
    assert spec.rope == RopeSpec("half", 1000000.0)
    assert set(spec.layers) == {LayerSpec("full", rope=True, moe=True)}


def test_mixtral_8x7b():
    spec = ModelSpec.from_hf(MIXTRAL)
    assert spec.num_params == 46_702_792_704
    assert round(spec.num_active_params / 1e8) == 129
    assert spec.router == "softmax"
    assert spec.normalize_topk
    assert spec.qk_norm == "none"
    assert set(spec.layers) == {LayerSpec("full", rope=True, moe=True)}


def test_glm_4_5_air():
    spec = ModelSpec.from_hf(GLM_4_5_AIR)
    assert spec.num_params == 106_852_251_264
    assert [layer.moe for layer in spec.layers] == [False] + [True] * 45
    assert spec.rotary_size == 64
    assert spec.grouped_routing == GroupedRouting(1, 1, 1.0)
    assert "layers.0.q_proj.bias" in [tensor.name for tensor in spec.dense_tensors]
    assert "layers.0.o_proj.bias" not in [tensor.name for tensor in spec.dense_tensors]
    assert next(t.name for t in spec.dense_tensors if t.exact) == "layers.1.router.correction"


def test_gpt_oss():
    spec = ModelSpec.from_hf(GPT_OSS_20B)
    assert spec.num_params == 20_914_757_184
    assert round(spec.num_active_params / 1e8) == 42
    assert spec.layers[0] == LayerSpec("sliding", rope=True, moe=True)
    assert spec.layers[1] == LayerSpec("full", rope=True, moe=True)
    assert spec.rope == RopeSpec(
        "half", 150000.0, YarnScaling(32.0, 32.0, 1.0, 4096, 0.1 * math.log(32) + 1, False)
    )
    assert spec.window == 128
    larger = ModelSpec.from_hf(GPT_OSS_120B)
    assert larger.num_params == 116_829_156_672
    assert round(larger.num_active_params / 1e8) == 57


def test_kv_cache_of_gpt_oss_half_of_which_is_bounded():
    """2 KiB a token and layer; twelve layers hold 128 tokens, twice, whatever the context is."""
    spec = ModelSpec.from_hf(GPT_OSS_20B)
    assert spec.kv_nbytes(128, 2) == 2048 * 12 * (128 + 128)
    for ctx in (4096, 131072):
        assert spec.kv_nbytes(ctx, 2) == 2048 * 12 * (ctx + 2 * 128)


def test_deepseek_v3():
    spec = ModelSpec.from_hf(DEEPSEEK_V3)
    assert spec.num_params == 671_026_419_200, "the published 671B, less what guesses later tokens"
    assert round(spec.num_active_params / 1e9) == 38
    assert spec.moe_layers == tuple(range(3, 61))
    assert set(spec.layers[3:]) == {LayerSpec("latent", rope=True, moe=True)}
    latent = spec.latent
    assert (latent.rank, latent.query_rank, latent.kept_size) == (512, 1536, 576)
    assert (latent.head_size, latent.value_size, spec.rotary_size) == (192, 128, 64)
    assert spec.grouped_routing == GroupedRouting(8, 4, 2.5)
    stretched = 0.1 * math.log(40) + 1
    assert latent.scale == pytest.approx(192**-0.5 * stretched**2)
    assert spec.rope == RopeSpec("interleaved", 10000.0, YarnScaling(40.0, 32.0, 1.0, 4096, 1.0))


def test_moonlight_16b_a3b():
    """An eighth of the heads of DeepSeek-V3, no YaRN, no latents of queries."""
    spec = ModelSpec.from_hf(MOONLIGHT)
    assert round(spec.num_params / 1e7) == 1596
    assert spec.latent.query_rank == 0
    assert spec.latent.scale == 192**-0.5
    assert spec.shared_intermediate_size == 2816


def test_deepseek_v2_lite():
    spec = ModelSpec.from_hf(DEEPSEEK_V2_LITE)
    assert round(spec.num_params / 1e8) == 157
    assert spec.router == "softmax"
    assert spec.grouped_routing is None
    assert not spec.normalize_topk


def test_kv_cache_of_deepseek_v3_is_one_latent_a_token_and_layer():
    """1.2% of what its 128 heads' keys and values would take."""
    spec = ModelSpec.from_hf(DEEPSEEK_V3)
    assert spec.kv_nbytes(4096, 2) == 61 * 4096 * 576 * 2
    assert spec.kv_nbytes(163840, 2) == 40 * spec.kv_nbytes(4096, 2)


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_equal_transformers_on_the_meta_device(name):
    import transformers

    config = json.loads(json.dumps(RELEASED[name]))
    kind = getattr(transformers, config["architectures"][0])
    for part in filter(None, [config.get("text_config"), config.get("vision_config"), config]):
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = 4
            if "layer_types" in part:
                part["layer_types"] = part["layer_types"][:4]
    with torch.device("meta"):
        model = kind(kind.config_class(**json.loads(json.dumps(config))))
    assert ModelSpec.from_hf(config).num_params == num_weights(model)


def test_kv_cache_of_scout():
    """Bytes a token and layer are 4096; chunked layers never hold more than 8192 tokens."""
    spec = ModelSpec.from_hf(SCOUT)
    gib = 2**30
    assert spec.kv_nbytes(8192, 2) == 1.5 * gib
    assert spec.kv_nbytes(128 << 10, 2) == (6 + 1.125) * gib
    assert spec.kv_nbytes(1 << 20, 2) == (48 + 1.125) * gib
    assert spec.kv_nbytes(1 << 20, 4) == 2 * spec.kv_nbytes(1 << 20, 2)


@pytest.mark.parametrize("name", RELEASED)
def test_new_and_old_ways_to_store_rope_agree(name):
    """transformers 5 writes rope_parameters, and counts of experts under another name."""
    import transformers

    config = json.loads(json.dumps(RELEASED[name]))
    kind = getattr(transformers, config["architectures"][0])
    saved = json.loads(kind.config_class(**config).to_json_string(use_diff=False))
    saved_text = saved.get("text_config", saved)
    assert "rope_parameters" in saved_text
    assert "rope_theta" not in saved_text
    saved["architectures"] = RELEASED[name]["architectures"]
    assert ModelSpec.from_hf(saved) == ModelSpec.from_hf(RELEASED[name])


def test_text_only_llama4_and_model_type_alone():
    text = ModelSpec.from_hf(SCOUT_TEXT | {"architectures": ["Llama4ForCausalLM"]})
    assert text.num_params == ModelSpec.from_hf(SCOUT).num_text_params
    assert ModelSpec.from_hf(SCOUT_TEXT) == text
    assert ModelSpec.from_hf({k: v for k, v in QWEN3.items() if k != "architectures"}).num_layers


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 4.0), (2.0, 2.0)])
def test_scaled_frequencies(factors):
    """The blend is 0/0 where low equals high; wavelengths beyond the border are divided."""
    low, high = factors
    context = low * 2 * math.pi * 1024  # so that the pair of frequency 1/1024 turns `low` times
    plain = inverse_frequencies(RopeSpec("half", 2.0**40), size=16)
    scaling = RopeScaling(16.0, low, high, context)
    found = inverse_frequencies(RopeSpec("half", 2.0**40, scaling), size=16)
    turns = context * plain / (2 * math.pi)
    assert low in turns, "nothing lies on the border"
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[turns < low], plain[turns < low] / 16)
    torch.testing.assert_close(found[turns >= high], plain[turns >= high])


YARN = {"factor": 8.0, "original_max_position_embeddings": 128}
YARN_VARIANTS = {
    "defaults": {},
    "no_factor": {"factor": None},
    "deepseek_v3": {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "mscales_differ": {"mscale": 0.7, "mscale_all_dim": 1.3},
    "one_mscale": {"mscale": 0.7},
    "given_factor": {"attention_factor": 1.25},
    "gpt_oss": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "one_pair": {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "no_stretch": {"factor": 1.0},
}


@pytest.mark.parametrize("name", YARN_VARIANTS)
def test_yarn_is_that_of_transformers(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", **YARN, **YARN_VARIANTS[name]}
    model = oracle("qwen3_moe", head_dim=32, max_position_embeddings=1024)
    model.config.rope_parameters = {"rope_theta": 10000.0, **scaling}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](model.config)
    config = changed(QWEN3, rope_theta=10000.0, max_position_embeddings=1024, rope_scaling=scaling)
    rope = ModelSpec.from_hf(config).rope
    torch.testing.assert_close(inverse_frequencies(rope, 32), frequencies)
    assert magnitude(rope) == pytest.approx(factor)


REFUSED = {
    "no architecture": ({}, "architectures"),
    "dense": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "dense"),
    "unknown": (
        {"architectures": ["ZorpForCausalLM"], "model_type": "zorp", "num_experts": 8},
        "ZorpForCausalLM` .zorp",
    ),
    "hidden_size missing": (changed(SCOUT, hidden_size=None), "`hidden_size` is missing"),
    "experts missing": (changed(QWEN3, num_experts=None), "expert"),
    "theta missing": (changed(QWEN3, rope_theta=None), "`rope_theta` is missing"),
    "chunk missing": (changed(SCOUT, attention_chunk_size=None), "`attention_chunk_size`"),
    "dense size missing": (
        changed(MAVERICK, intermediate_size_mlp=None),
        "`intermediate_size_mlp`",
    ),
    "text": (changed(SCOUT, hidden_size="5120"), "`hidden_size`.*should be"),
    "fraction": (changed(SCOUT, hidden_size=5120.5), "`hidden_size`.*should be"),
    "zero": (changed(QWEN3, num_hidden_layers=0), "`num_hidden_layers`.*at least 1"),
    "flag for a size": (changed(QWEN3, vocab_size=True), "`vocab_size`.*should be"),
    "yarn": (
        changed(QWEN3, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "`original_max_position_embeddings` is missing",
    ),
    "longrope": (changed(QWEN3, rope_scaling={"rope_type": "longrope"}), "longrope"),
    "scaling factor missing": (changed(SCOUT, rope_scaling={"type": "llama3"}), "`factor`"),
    "activation": (changed(QWEN3, hidden_act="gelu"), "gelu"),
    "sliding": (changed(QWEN3, use_sliding_window=True), "use_sliding_window"),
    "another activation": (changed(GPT_OSS_20B, swiglu_limit=6.0), "swiglu_limit"),
    "chunks in gpt-oss": (
        changed(GPT_OSS_20B, layer_types=["chunked_attention"] * 24),
        "chunked_attention.* not supported",
    ),
    "few layer types": (changed(GPT_OSS_20B, layer_types=["full_attention"]), "1 entries for 24"),
    "windows in llama4": (
        changed(SCOUT, layer_types=["sliding_attention"] * 48),
        "sliding_attention.* not supported",
    ),
    "groups of experts": (changed(GLM_4_5_AIR, n_group=3), "n_group"),
    "more groups than there are": (changed(GLM_4_5_AIR, n_group=2, topk_group=3), "topk_group"),
    "groups of one": (changed(GLM_4_5_AIR, n_group=128), "n_group"),
    "an odd part turns": (changed(GLM_4_5_AIR, partial_rotary_factor=0.01), "partial_rotary"),
    "odd rope": (changed(DEEPSEEK_V3, qk_rope_head_dim=63), "`qk_rope_head_dim`.*even"),
    "rank missing": (changed(DEEPSEEK_V3, kv_lora_rank=None), "`kv_lora_rank` is missing"),
    "scores": (changed(DEEPSEEK_V3, scoring_func="softmax"), "`scoring_func` `softmax`"),
    "choice": (changed(DEEPSEEK_V3, topk_method="greedy"), "`topk_method` `greedy`"),
    "some layers": (changed(DEEPSEEK_V3, moe_layer_freq=2), "`moe_layer_freq` `2`"),
    "V2's groups": (
        changed(DEEPSEEK_V2_LITE, topk_method="group_limited_greedy"),
        "`topk_method` `group_limited_greedy`",
    ),
    "V2's factor": (changed(DEEPSEEK_V2_LITE, routed_scaling_factor=16.0), "routed_scaling"),
    "V2 normalised": (changed(DEEPSEEK_V2_LITE, norm_topk_prob=True), "norm_topk_prob"),
    "short list": (changed(SCOUT, no_rope_layers=[1, 0]), "no_rope_layers.*2 entries"),
    "layer type": (changed(SCOUT, layer_types=["mamba"] * 48), "mamba"),
    "head groups": (changed(QWEN3, num_key_value_heads=5), "no multiple"),
    "too few experts": (changed(QWEN3, num_experts_per_tok=129), "exceeds"),
    "no layer with experts": (changed(SCOUT, moe_layers=[]), "no layer with experts"),
    "text_config": (SCOUT | {"text_config": "none"}, "`text_config`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_hint(name):
    config, complaint = REFUSED[name]
    with pytest.raises(MoecliError, match=complaint) as caught:
        ModelSpec.from_hf(config)
    assert caught.value.hint


def test_a_mixture_under_a_nested_name_is_no_dense_model():
    config = {"architectures": ["NewMoe"], "text_config": {"n_routed_experts": 64}}
    with pytest.raises(MoecliError, match="does not know"):
        ModelSpec.from_hf(config)


def test_quantized_checkpoints_have_the_same_spec():
    assert ModelSpec.from_hf(QWEN3 | {"quantization_config": {}}) == ModelSpec.from_hf(QWEN3)


def test_a_flag_may_be_stored_as_a_number():
    assert ModelSpec.from_hf(changed(SCOUT, attn_temperature_tuning=4)) == ModelSpec.from_hf(SCOUT)
    assert ModelSpec.from_hf(changed(SCOUT, attn_temperature_tuning=0)).temperature is None


def test_tied_embeddings_count_once():
    model = oracle("qwen3_moe", tie_word_embeddings=True)
    spec = ModelSpec.from_hf(
        json.loads(model.config.to_json_string()) | {"architectures": ["Qwen3MoeForCausalLM"]}
    )
    assert [t.name for t in spec.dense_tensors].count("lm_head") == 0
    assert spec.num_params == sum(p.numel() for p in model.parameters())
