"""Knows Hugging Face's field names of the families beside Llama 4 and Qwen3-MoE; no tensors."""

from collections.abc import Callable

from moecli.errors import MoecliError
from moecli.models.config import GroupedRouting, LayerSpec, ModelSpec
from moecli.models.hf_fields import CONFIG_HINT, Fields, attention_kind, common_of, rope_of

_CLAMPED_SWIGLU = (7.0, 1.702)  # what the kernels' activation of this name is made for


def _mixtral(architecture: str, fields: Fields) -> ModelSpec:
    count, common = fields.size("num_hidden_layers"), common_of(fields)
    window = fields.get("sliding_window", int, 0) or None
    return ModelSpec(
        **common,
        architecture=architecture,
        family="mixtral",
        head_dim=fields.size("head_dim", common["hidden_size"] // common["num_heads"]),
        layers=(LayerSpec("sliding" if window else "full", rope=True, moe=True),) * count,
        window=window,
        num_experts=fields.size("num_local_experts"),
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        router="softmax",
        normalize_topk=True,
        weight_on_input=False,
        rope=rope_of(fields, "half"),
        qk_norm="none",
        chunk_size=None,
        temperature=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _glm4_moe(architecture: str, fields: Fields) -> ModelSpec:
    count, common = fields.size("num_hidden_layers"), common_of(fields)
    dense = fields.get("first_k_dense_replace", int, 1)
    inner, head_dim = fields.size("moe_intermediate_size"), fields.size("head_dim")
    return ModelSpec(
        **common,
        architecture=architecture,
        family="glm4_moe",
        head_dim=head_dim,
        layers=tuple(LayerSpec("full", rope=True, moe=index >= dense) for index in range(count)),
        num_experts=fields.size("n_routed_experts"),
        expert_intermediate_size=inner,
        shared_intermediate_size=inner * fields.size("n_shared_experts", 1),
        dense_intermediate_size=fields.size("intermediate_size") if dense else 0,
        router="grouped",
        normalize_topk=fields.flag("norm_topk_prob", True),
        grouped_routing=grouped_routing_of(fields),
        weight_on_input=False,
        rope=rope_of(fields, "half"),
        rotary_size=_rotary_size(fields, head_dim),
        qk_norm="weighted_before_rope" if fields.flag("use_qk_norm", False) else "none",
        output_bias=False,
        chunk_size=None,
        temperature=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _gpt_oss(architecture: str, fields: Fields) -> ModelSpec:
    limit, alpha = fields.get("swiglu_limit", float, 7.0), fields.get("swiglu_alpha", float, 1.702)
    if (limit, alpha) != _CLAMPED_SWIGLU:
        raise MoecliError(
            f"moecli does not know `swiglu_limit` {limit:g} with `swiglu_alpha` {alpha:g}",
            "released models have {:g} and {:g}".format(*_CLAMPED_SWIGLU),
        )
    count, common = fields.size("num_hidden_layers"), common_of(fields)
    kinds = fields.get("layer_types", list, []) or [
        "full_attention" if index % 2 else "sliding_attention" for index in range(count)
    ]
    attention = tuple(attention_kind(fields, kind, "sliding") for kind in kinds)
    if len(kinds) < count:
        raise MoecliError(
            f"`layer_types` in {fields.where} has {len(kinds)} entries for {count} layers",
            CONFIG_HINT,
        )
    return ModelSpec(
        **common,
        architecture=architecture,
        family="gpt_oss",
        head_dim=fields.size("head_dim"),
        layers=tuple(LayerSpec(kind, rope=True, moe=True) for kind in attention[:count]),
        num_experts=fields.size("num_local_experts"),
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        router="softmax_of_chosen",
        normalize_topk=False,
        router_bias=True,
        expert_bias=True,
        expert_activation="clamped_swiglu",
        weight_on_input=False,
        rope=rope_of(fields, "half"),
        qk_norm="none",
        sinks=True,
        window=fields.size("sliding_window") if "sliding" in attention else None,
        chunk_size=None,
        temperature=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def grouped_routing_of(fields: Fields) -> GroupedRouting:
    """The router of DeepSeek-V3, which GLM-4.5 has taken over."""
    groups, chosen = fields.size("n_group", 1), fields.size("topk_group", 1)
    experts = fields.size("n_routed_experts")
    if experts % groups or chosen > groups or experts // groups < 2:
        raise MoecliError(
            f"{experts} experts do not make `n_group` ({groups}) groups of two or more, of which "
            f"`topk_group` ({chosen}) are chosen",
            CONFIG_HINT,
        )
    return GroupedRouting(groups, chosen, fields.get("routed_scaling_factor", float, 1.0))


def _rotary_size(fields: Fields, head_dim: int) -> int:
    """Like the rest of RoPE's numbers, transformers 5 stores it in `rope_parameters`."""
    share = fields.get("partial_rotary_factor", float, 0.5)
    rope = Fields(fields.get("rope_parameters", dict, {}), "`rope_parameters` of config.json")
    size = int(head_dim * rope.get("partial_rotary_factor", float, share))
    if size < 2 or size % 2 or size > head_dim:
        raise MoecliError(
            f"`partial_rotary_factor` makes RoPE turn {size} of {head_dim} components", CONFIG_HINT
        )
    return size


FAMILY_READERS: dict[str, Callable[[str, Fields], ModelSpec]] = {
    "MixtralForCausalLM": _mixtral,
    "Glm4MoeForCausalLM": _glm4_moe,
    "GptOssForCausalLM": _gpt_oss,
}
