"""The registry of families: tiny random models, what is varied, what each was released as.

Tests are parametrized by it and docs/models.md is made of it, so that neither says more than is
checked.
"""

from dataclasses import dataclass, field
from typing import Any

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
)

LENGTH = 45  # tokens of a sequence: five chunks or windows of 8 and a rest
BORDER = 8  # tokens of a chunk of attention, or of a sliding window, where a family has them

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
# Sizes that groups of 32 divide: of a model that is quantized.
_WIDE = {"hidden_size": 64, "head_dim": 32}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {"rope_parameters": _LLAMA3_ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
_LATENT = {
    **{key: size for key, size in _SIZES.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
_WIDE_LATENT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """One family by its `model_type`, and how its tests build and vary it."""

    model_type: str
    title: str  # for people
    config: str  # classes of transformers
    model: str
    sizes: dict[str, Any]
    variants: dict[str, dict[str, Any]]  # what is changed in a tiny model, by a word for it
    wide: dict[str, Any]  # changes that make a tiny model one that can be quantized
    unfused: bool  # transformers expands the experts of a quantized checkpoint to bf16
    library_reads: bool = True  # transformers loads what `moecli quantize` writes
    compiled: bool = True  # steps of few tokens are compiled calls on the processor
    chunked: bool = False  # some layers see one chunk of BORDER tokens
    sliding: bool = False  # some layers see a window of BORDER tokens
    released: dict[str, dict[str, Any]] = field(default_factory=dict)  # config.json, by name
    notes: tuple[str, ...] = ()  # what is not done, for people


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama4",
            "Llama 4",
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            _SIZES
            | {
                "intermediate_size": 24,
                "intermediate_size_mlp": 40,
                "num_hidden_layers": 4,
                "num_local_experts": 4,
                "attention_chunk_size": BORDER,
                "floor_scale": 4,
                "attn_scale": 0.5,
            },
            {
                "plain": {},
                "no_qk_norm": {"use_qk_norm": False},
                "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
                "explicit_moe_layers": {"moe_layers": [0, 3]},
                "no_tuning": {"attn_temperature_tuning": False},
                "rope_layers": {"no_rope_layers": [0, 1, 0, 1]},
                "no_rope_layers_empty": {"no_rope_layers": []},
                "all_full": {"layer_types": ["full_attention"] * 4},
                "tied": {"tie_word_embeddings": True},
                "bias": {"attention_bias": True},
                "top2": {"num_experts_per_tok": 2},
                "llama3": _LLAMA3,
                "llama3_low_equals_high": {
                    "rope_parameters": _LLAMA3_ROPE
                    | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}
                },
                "chunk_of_5_one_kv_head": {"attention_chunk_size": 5, "num_key_value_heads": 1},
                "chunk_beyond_length": {"attention_chunk_size": 64, "num_key_value_heads": 4},
            },
            {"intermediate_size": 32, "intermediate_size_mlp": 64, **_WIDE},
            unfused=False,
            chunked=True,
            released={"Llama 4 Scout": SCOUT, "Llama 4 Maverick": MAVERICK},
        ),
        Family(
            "qwen3_moe",
            "Qwen3-MoE",
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            _SIZES
            | {
                "intermediate_size": 40,
                "moe_intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_experts": 6,
                "num_experts_per_tok": 2,
            },
            {
                "plain": {},
                "norm_topk": {"norm_topk_prob": True},
                "sparse_step": {"decoder_sparse_step": 2},
                "mlp_only": {"mlp_only_layers": [0, 2]},
                "bias": {"attention_bias": True},
                "tied": {"tie_word_embeddings": True},
                "no_head_groups": {"num_key_value_heads": 4},
                "llama3": _LLAMA3,
                "yarn": {"rope_parameters": _YARN_ROPE},
            },
            {
                "moe_intermediate_size": 32,
                "intermediate_size": 64,
                "mlp_only_layers": [1],
                **_WIDE,
            },
            unfused=True,
            released={"Qwen3-30B-A3B": QWEN3},
        ),
        Family(
            "deepseek_v3",
            "DeepSeek-V3",
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            _LATENT
            | {
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 1.5,
            },
            {
                "plain": {},
                "queries_of_hidden_states": {"q_lora_rank": None},
                "half_rope": {"rope_interleave": False},
                "yarn": {"rope_parameters": _YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.3}},
                "yarn_without_mscale": {"rope_parameters": _YARN_ROPE},
                "values_beyond_keys": {"v_head_dim": 14},
                "rank_below_heads": {"kv_lora_rank": 4},
                "bias": {"attention_bias": True},
                "tied": {"tie_word_embeddings": True},
                "other_eps": {"rms_norm_eps": 0.05},
                "no_dense_layers": {"first_k_dense_replace": 0},
                "one_shared_expert": {"n_shared_experts": 1},
                "one_group": {"n_group": 1, "topk_group": 1},
                "not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
            },
            _WIDE_LATENT,
            unfused=True,
            compiled=False,
            released={"DeepSeek-V3": DEEPSEEK_V3, "Moonlight-16B-A3B": MOONLIGHT},
            notes=("layers that predict later tokens (MTP) are left out",),
        ),
        Family(
            "deepseek_v2",
            "DeepSeek-V2-Lite",
            "DeepseekV2Config",
            "DeepseekV2ForCausalLM",
            _LATENT,
            {
                "plain": {},
                "queries_of_hidden_states": {"q_lora_rank": None},
                "yarn": {"rope_parameters": _YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.7}},
                "no_dense_layers": {"first_k_dense_replace": 0},
            },
            _WIDE_LATENT,
            unfused=True,
            compiled=False,
            released={"DeepSeek-V2-Lite": DEEPSEEK_V2_LITE},
            notes=("V2-Lite and its like alone: V2 has a router of its own",),
        ),
        Family(
            "mixtral",
            "Mixtral",
            "MixtralConfig",
            "MixtralForCausalLM",
            _SIZES
            | {
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
            },
            {
                "plain": {},
                "top3": {"num_experts_per_tok": 3},
                "tied": {"tie_word_embeddings": True},
                "no_head_groups": {"num_key_value_heads": 4},
                "window": {"sliding_window": BORDER},
            },
            {"intermediate_size": 32, **_WIDE},
            unfused=True,
            released={"Mixtral 8x7B": MIXTRAL},
        ),
        Family(
            "glm4_moe",
            "GLM-4.5",
            "Glm4MoeConfig",
            "Glm4MoeForCausalLM",
            _SIZES
            | {
                "intermediate_size": 40,
                "moe_intermediate_size": 24,
                "num_hidden_layers": 3,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "attention_bias": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.5,
                },
            },
            {
                "plain": {},
                "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
                "two_groups_one_taken": {"n_group": 2, "topk_group": 1},
                "no_normalizing": {"norm_topk_prob": False},
                "qk_norm": {"use_qk_norm": True},
                "no_bias": {"attention_bias": False},
                "all_moe_two_shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
                "tied": {"tie_word_embeddings": True},
                "all_turns": {
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 100.0,
                        "partial_rotary_factor": 1.0,
                    }
                },
            },
            {"moe_intermediate_size": 32, "intermediate_size": 64, **_WIDE},
            unfused=True,
            released={"GLM-4.5-Air": GLM_4_5_AIR},
            notes=("layers that predict later tokens (MTP) are left out",),
        ),
        Family(
            "gpt_oss",
            "gpt-oss",
            "GptOssConfig",
            "GptOssForCausalLM",
            _SIZES
            | {
                "intermediate_size": 24,
                "num_hidden_layers": 4,
                "num_local_experts": 6,
                "num_experts_per_tok": 3,
                "sliding_window": BORDER,
                "rope_parameters": _YARN_ROPE | {"truncate": False},
            },
            {
                "plain": {},
                "window_of_5": {"sliding_window": 5},
                "window_beyond_length": {"sliding_window": 64},
                "window_of_1": {"sliding_window": 1},
                "all_full": {"layer_types": ["full_attention"] * 4},
                "all_sliding": {"layer_types": ["sliding_attention"] * 4},
                "no_head_groups": {"num_key_value_heads": 4},
                "no_attention_bias": {"attention_bias": False},
                "tied": {"tie_word_embeddings": True},
            },
            {"intermediate_size": 32, **_WIDE},
            unfused=False,
            library_reads=False,
            sliding=True,
            released={"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B},
        ),
    )
}
VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]
