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


_READERS: dict[str, Callable[[str, Fields], Outline]] = {
    "LlamaForCausalLM": _llama,
}
