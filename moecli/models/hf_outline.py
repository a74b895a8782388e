"""Knows how config.json describes models that our own decoder does not run and a plan counts.

A family that hf_config has learned to read is not looked up here any more.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moecli.models import hf_config
from moecli.models.config import DenseTensor
from moecli.models.facts import read_facts
from moecli.models.hf_fields import Fields
from moecli.models.outline import Counted, LayerOutline, Outline


def read_counted(config: Mapping[str, Any]) -> Counted:
    """The spec of a config.json that our own decoder runs, else what can be counted of it.

    Else what the library counts, in the library's seconds. Raises MoecliError for an architecture
    that nobody knows, and for a missing or odd key.
    """
    architecture = hf_config.architecture_of(config)
    reader = _READERS.get(architecture)
    if hf_config.has_reader(config) or reader is None:
        return read_facts(config)
    return reader(architecture, Fields(config))


def _tensor(name: str, rows: int, columns: int, bias: bool = False) -> list[DenseTensor]:
    found = [DenseTensor(name, (rows, columns), linear=True)]
    return [*found, DenseTensor(f"{name}.bias", (rows,))] if bias else found


def _attention(
    fields: Fields, *, head_dim: int, bias: bool = False, o_bias: bool = False
) -> list[DenseTensor]:
    hidden, q_size = fields.size("hidden_size"), fields.size("num_attention_heads") * head_dim
    kv_size = fields.size("num_key_value_heads") * head_dim
    return [
        *_tensor("q_proj", q_size, hidden, bias),
        *_tensor("k_proj", kv_size, hidden, bias),
        *_tensor("v_proj", kv_size, hidden, bias),
        *_tensor("o_proj", hidden, q_size, o_bias),
    ]


def _latent_attention(fields: Fields) -> list[DenseTensor]:
    """Queries, keys and values that come from latents of low rank (MLA)."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_rank, rope = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
    nope, value = fields.size("qk_nope_head_dim"), fields.size("v_head_dim")
    rank = fields.get("q_lora_rank", int, 0)
    queries = _tensor("q_proj", heads * (nope + rope), hidden)
    if rank:
        queries = [
            *_tensor("q_a_proj", rank, hidden),
            DenseTensor("q_a_norm", (rank,)),
            *_tensor("q_b_proj", heads * (nope + rope), rank),
        ]
    return [
        *queries,
        *_tensor("kv_a_proj", kv_rank + rope, hidden),
        DenseTensor("kv_a_norm", (kv_rank,)),
        *_tensor("kv_b_proj", heads * (nope + value), kv_rank),
        *_tensor("o_proj", hidden, heads * value),
    ]


def _mlp(prefix: str, hidden: int, intermediate: int) -> list[DenseTensor]:
    return [
        *_tensor(f"{prefix}.gate_proj", intermediate, hidden),
        *_tensor(f"{prefix}.up_proj", intermediate, hidden),
        *_tensor(f"{prefix}.down_proj", hidden, intermediate),
    ]


def _layer(
    fields: Fields,
    attention: list[DenseTensor],
    rest: list[DenseTensor],
    *,
    moe: bool,
    kv: tuple[int, int],
    window: int | None = None,
) -> LayerOutline:
    """`rest` is what follows attention; `kv` the numbers and vectors that a token leaves."""
    hidden = fields.size("hidden_size")
    norms = [DenseTensor("input_norm", (hidden,)), DenseTensor("post_norm", (hidden,))]
    return LayerOutline((*norms, *attention, *rest), moe, *kv, window)


def _common(fields: Fields, head_dim: int) -> dict[str, Any]:
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": fields.size("hidden_size"),
        "num_heads": fields.size("num_attention_heads"),
        "num_kv_heads": fields.size("num_key_value_heads"),
        "head_dim": head_dim,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "max_context": fields.size("max_position_embeddings"),
    }


def _head_dim(fields: Fields) -> int:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return fields.size("head_dim", hidden // heads)


def _keys_and_values(fields: Fields, head_dim: int) -> tuple[int, int]:
    heads = fields.size("num_key_value_heads")
    return 2 * heads * head_dim, 2 * heads


def _router(fields: Fields, experts: int, bias: bool = False) -> list[DenseTensor]:
    found = [DenseTensor("router", (experts, fields.size("hidden_size")))]
    return [*found, DenseTensor("router.bias", (experts,))] if bias else found


def _llama(architecture: str, fields: Fields) -> Outline:
    """A dense model."""
    head_dim = _head_dim(fields)
    bias = fields.flag("attention_bias", False)
    attention = _attention(fields, head_dim=head_dim, bias=bias, o_bias=bias)
    layer = _layer(fields, attention, [], moe=True, kv=_keys_and_values(fields, head_dim))
    return Outline(
        **_common(fields, head_dim),
        architecture=architecture,
        layers=(layer,) * fields.size("num_hidden_layers"),
        num_experts=1,
        experts_per_token=1,
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        expert_bias=fields.flag("mlp_bias", False),
    )


def _mixtral(architecture: str, fields: Fields) -> Outline:
    head_dim, experts = _head_dim(fields), fields.size("num_local_experts")
    layer = _layer(
        fields,
        _attention(fields, head_dim=head_dim),
        _router(fields, experts),
        moe=True,
        kv=_keys_and_values(fields, head_dim),
        window=fields.get("sliding_window", int, 0) or None,
    )
    return Outline(
        **_common(fields, head_dim),
        architecture=architecture,
        layers=(layer,) * fields.size("num_hidden_layers"),
        num_experts=experts,
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
    )


def _gpt_oss(architecture: str, fields: Fields) -> Outline:
    """Every second layer sees a window only; heads have a sink, experts and router biases."""
    head_dim, experts = _head_dim(fields), fields.size("num_local_experts")
    count, window = fields.size("num_hidden_layers"), fields.size("sliding_window")
    bias = fields.flag("attention_bias", True)
    attention = _attention(fields, head_dim=head_dim, bias=bias, o_bias=bias)
    attention.append(DenseTensor("sinks", (fields.size("num_attention_heads"),)))
    kinds = fields.get("layer_types", list, [])
    kinds = kinds or ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    layers = tuple(
        _layer(
            fields,
            attention,
            _router(fields, experts, bias=True),
            moe=True,
            kv=_keys_and_values(fields, head_dim),
            window=window if kind == "sliding_attention" else None,
        )
        for kind in kinds[:count]
    )
    return Outline(
        **_common(fields, head_dim),
        architecture=architecture,
        layers=layers,
        num_experts=experts,
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_intermediate_size=fields.size("intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        expert_bias=True,
    )


def _leading_dense(
    architecture: str,
    fields: Fields,
    head_dim: int,
    attention: list[DenseTensor],
    kv: tuple[int, int],
) -> Outline:
    """The first layers have no experts, all others routed and shared ones."""
    hidden, experts = fields.size("hidden_size"), fields.size("n_routed_experts")
    dense = fields.get("first_k_dense_replace", int, 0)
    inner, count = fields.size("moe_intermediate_size"), fields.size("num_hidden_layers")
    shared = inner * fields.get("n_shared_experts", int, 0)
    mlp = _mlp("mlp", hidden, fields.size("intermediate_size"))
    routed = _router(fields, experts) + (_mlp("shared", hidden, shared) if shared else [])
    plain = _layer(fields, attention, mlp, moe=False, kv=kv)
    moe = _layer(fields, attention, routed, moe=True, kv=kv)
    return Outline(
        **_common(fields, head_dim),
        architecture=architecture,
        layers=(plain,) * min(dense, count) + (moe,) * max(0, count - dense),
        num_experts=experts,
        experts_per_token=fields.size("num_experts_per_tok"),
        expert_intermediate_size=inner,
        shared_intermediate_size=shared,
        dense_intermediate_size=fields.size("intermediate_size") if dense else 0,
    )


def _deepseek_v3(architecture: str, fields: Fields) -> Outline:
    """A token leaves one latent a layer and one key with RoPE, whatever the number of heads."""
    kv_rank, rope = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim")
    head_dim = fields.size("qk_nope_head_dim") + rope
    attention = _latent_attention(fields)
    return _leading_dense(architecture, fields, head_dim, attention, (kv_rank + rope, 2))


def _glm4_moe(architecture: str, fields: Fields) -> Outline:
    head_dim = _head_dim(fields)
    attention = _attention(fields, head_dim=head_dim, bias=fields.flag("attention_bias", False))
    if fields.flag("use_qk_norm", False):
        attention += [DenseTensor(name, (head_dim,)) for name in ("q_norm", "k_norm")]
    kv = _keys_and_values(fields, head_dim)
    return _leading_dense(architecture, fields, head_dim, attention, kv)


_READERS: dict[str, Callable[[str, Fields], Outline]] = {
    "LlamaForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Glm4MoeForCausalLM": _glm4_moe,
}
