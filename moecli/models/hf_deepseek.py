"""Knows Hugging Face's field names of DeepSeek-V3 and V2-Lite. No tensors."""

from typing import Any

from moecli.errors import MoecliError
from moecli.models.config import LatentSpec, LayerSpec, ModelSpec, YarnScaling
from moecli.models.hf_families import grouped_routing_of
from moecli.models.hf_fields import CONFIG_HINT, Fields, common_of, rope_of, yarn_mscale


def deepseek_v3(architecture: str, fields: Fields) -> ModelSpec:
    """Experts are chosen group by group, by sigmoid and a learned correction."""
    _require(fields, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    interleaved = fields.flag("rope_interleave", True)
    return ModelSpec(
        **_common(fields, first_dense=3),
        architecture=architecture,
        family="deepseek_v3",
        router="grouped",
        normalize_topk=fields.flag("norm_topk_prob", True),
        rope=rope_of(fields, "interleaved" if interleaved else "half"),
        grouped_routing=grouped_routing_of(fields),
    )


def deepseek_v2(architecture: str, fields: Fields) -> ModelSpec:
    """V2-Lite: as V3 with a plain router. V2 itself chooses among groups in a way of its own."""
    known = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    _require(fields, known | {"routed_scaling_factor": 1.0, "mlp_bias": False})
    return ModelSpec(
        **_common(fields, first_dense=0),
        architecture=architecture,
        family="deepseek_v2",
        router="softmax",
        normalize_topk=False,
        rope=rope_of(fields, "interleaved"),
    )


def _common(fields: Fields, first_dense: int) -> dict[str, Any]:
    """Latent attention in every layer; all layers with experts share some besides."""
    _require(fields, {"moe_layer_freq": 1})
    count = fields.size("num_hidden_layers")
    dense = fields.get("first_k_dense_replace", int, first_dense)
    inner, latent = fields.size("moe_intermediate_size"), _latent(fields)
    return common_of(fields) | {
        "head_dim": latent.head_size,
        "layers": tuple(LayerSpec("latent", rope=True, moe=i >= dense) for i in range(count)),
        "num_experts": fields.size("n_routed_experts"),
        "expert_intermediate_size": inner,
        "shared_intermediate_size": inner * fields.get("n_shared_experts", int, 0),
        "dense_intermediate_size": fields.size("intermediate_size") if dense else 0,
        "weight_on_input": False,
        "qk_norm": "none",
        "chunk_size": None,
        "temperature": None,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "latent": latent,
        "rotary_size": latent.rope_size,
    }


def _latent(fields: Fields) -> LatentSpec:
    nope, rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    if rope % 2:
        raise MoecliError(
            f"`qk_rope_head_dim` in config.json must be even, not {rope}", CONFIG_HINT
        )
    return LatentSpec(
        rank=fields.size("kv_lora_rank"),
        query_rank=fields.get("q_lora_rank", int, 0),
        nope_size=nope,
        rope_size=rope,
        value_size=fields.size("v_head_dim"),
        scale=(nope + rope) ** -0.5 * _score_scale(fields),
    )


def _score_scale(fields: Fields) -> float:
    """By what scores are larger where YaRN stretches the context."""
    scaling = rope_of(fields, "half").scaling
    stored: dict[str, Any] = fields.get("rope_parameters", dict, {})
    stored = stored or fields.get("rope_scaling", dict, {})
    of_all = Fields(stored).get("mscale_all_dim", float, 0.0)
    if not isinstance(scaling, YarnScaling) or not of_all:
        return 1.0
    return yarn_mscale(scaling.factor, of_all) ** 2


def _require(fields: Fields, known: dict[str, Any]) -> None:
    """Refuses what config.json may say and moecli, or the model's own library, does not compute."""
    for key, value in known.items():
        found = fields.values.get(key)
        if found is not None and found != value:
            raise MoecliError(f"`{key}` `{found}` is not supported", f"supported: `{value}`")
