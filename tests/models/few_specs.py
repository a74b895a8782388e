"""Tiny decoders for steps of few tokens: one a kind of attention, of heads, of sizes."""

from dataclasses import replace
from typing import Any

from moecli.models.config import (
    GroupedRouting,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    TemperatureSpec,
)

SPEC = ModelSpec(
    architecture="Tiny",
    family="qwen3_moe",
    vocab_size=31,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    layers=(LayerSpec("full", True, True), LayerSpec("full", True, False)),
    num_experts=6,
    experts_per_token=2,
    expert_intermediate_size=8,
    shared_intermediate_size=0,
    dense_intermediate_size=40,
    router="softmax",
    normalize_topk=True,
    weight_on_input=False,
    rope=RopeSpec("half", 100.0),
    qk_norm="weighted_before_rope",
    attention_bias=False,
    chunk_size=None,
    temperature=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_context=4096,
)
CHUNKED = replace(
    SPEC,
    layers=(LayerSpec("chunked", True, True), LayerSpec("full", False, True)),
    chunk_size=8,
    router="sigmoid",
    normalize_topk=False,
    weight_on_input=True,
    shared_intermediate_size=24,
    rope=RopeSpec("interleaved", 100.0),
    qk_norm="weightless_after_rope",
    temperature=TemperatureSpec(4, 0.5),
)

WINDOWS = replace(
    SPEC,
    layers=(LayerSpec("sliding", True, True), LayerSpec("full", True, True)),
    window=8,
    sinks=True,
    attention_bias=True,
    router="softmax_of_chosen",
    router_bias=True,
    normalize_topk=False,
    qk_norm="none",
)
GROUPED = replace(
    SPEC,
    rotary_size=6,
    num_experts=12,
    experts_per_token=3,
    router="grouped",
    grouped_routing=GroupedRouting(4, 2, 2.5),
    shared_intermediate_size=24,
    attention_bias=True,
    output_bias=False,
)


def heads(query: int, key: int, size: int, **changes: Any) -> ModelSpec:
    return replace(SPEC, num_heads=query, num_kv_heads=key, head_dim=size, **changes)


CASES = {
    "as_qwen3": SPEC,
    "as_llama4": CHUNKED,
    "as_mixtral": replace(SPEC, qk_norm="none"),
    "biases": replace(SPEC, attention_bias=True),
    "one_group_of_8": heads(8, 1, 64),
    "groups_of_7": heads(7, 1, 8),
    "groups_of_5": heads(10, 2, 18),
    "groups_of_3": heads(6, 2, 34),
    "no_groups": heads(3, 3, 128),
    "heads_of_64": heads(4, 1, 64, rope=RopeSpec("interleaved", 100.0)),
    "heads_of_7_turn_nowhere": heads(4, 2, 7, layers=(LayerSpec("full", False, True),)),
    "heads_of_20": heads(12, 2, 20, qk_norm="weightless_after_rope"),
    "as_gpt_oss": WINDOWS,
    "as_glm4": GROUPED,
    "one_group_of_experts": replace(
        GROUPED, grouped_routing=GroupedRouting(1, 1, 1.0), normalize_topk=False
    ),
    "odd_widths": replace(SPEC, hidden_size=37, dense_intermediate_size=29),
}
