"""Knows how fields of config.json are read, and those that all families call by the same name."""

import math
from collections.abc import Mapping
from typing import Any

from moecli.errors import MoecliError
from moecli.models.config import AttentionKind, RopeKind, RopeScaling, RopeSpec, YarnScaling

CONFIG_HINT = "download config.json again, or compare it with the one the model was released with"
_MISSING: Any = object()


class Fields:
    """Typed reads of one JSON object; every complaint names the key."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise MoecliError(f"`{key}` is missing from {self.where}", CONFIG_HINT)
            return default
        fits = isinstance(value, (int, float)) if kind in (int, float) else isinstance(value, kind)
        if not fits or (kind is int and (isinstance(value, bool) or value != int(value))):
            raise MoecliError(
                f"`{key}` in {self.where} should be of type {kind.__name__}, not {value!r}",
                CONFIG_HINT,
            )
        return kind(value)

    def size(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise MoecliError(
                f"`{key}` in {self.where} must be at least 1, not {value}", CONFIG_HINT
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Some releases store a flag as a number."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def section(self, key: str) -> "Fields":
        return Fields(self.get(key, dict), f"`{key}` of {self.where}")


def rope_of(fields: Fields, kind: RopeKind) -> RopeSpec:
    """transformers 5 stores `rope_parameters`; before, `rope_theta` and `rope_scaling`."""
    new = fields.get("rope_parameters", dict, {})
    scaling = Fields(new or fields.get("rope_scaling", dict, {}), "the RoPE part of config.json")
    owner = scaling if new.get("rope_theta") is not None else fields
    theta = owner.get("rope_theta", float)
    rope_type = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if rope_type == "default":
        return RopeSpec(kind, theta)
    if rope_type == "yarn":
        return RopeSpec(kind, theta, _yarn(fields, scaling))
    if rope_type != "llama3":
        raise MoecliError(
            f"RoPE scaling `{rope_type}` is not supported", "supported: `llama3`, `yarn`"
        )
    return RopeSpec(
        kind,
        theta,
        RopeScaling(
            factor=scaling.get("factor", float),
            low=scaling.get("low_freq_factor", float),
            high=scaling.get("high_freq_factor", float),
            original_context=scaling.size("original_max_position_embeddings"),
        ),
    )


def _yarn(fields: Fields, scaling: Fields) -> YarnScaling:
    context = scaling.size("original_max_position_embeddings")
    factor = scaling.get("factor", float, fields.size("max_position_embeddings") / context)
    mscale = scaling.get("mscale", float, 0.0)
    of_all = scaling.get("mscale_all_dim", float, 0.0)
    magnitude = yarn_mscale(factor)
    if mscale and of_all:
        magnitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, of_all)
    return YarnScaling(
        factor=factor,
        fast=scaling.get("beta_fast", float, 0.0) or 32.0,
        slow=scaling.get("beta_slow", float, 0.0) or 1.0,
        original_context=context,
        magnitude=scaling.get("attention_factor", float, magnitude),
        whole_pairs=scaling.flag("truncate", True),
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much larger scores are made where a context is stretched `factor` times."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _require_silu(fields: Fields) -> None:
    activation = fields.get("hidden_act", str)
    if activation != "silu":
        raise MoecliError(f"`hidden_act` `{activation}` is not supported", "supported: `silu`")


def common_of(fields: Fields) -> dict[str, Any]:
    """What all families call by the same name."""
    _require_silu(fields)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads"),
        "experts_per_token": fields.size("num_experts_per_tok"),
        "rms_norm_eps": fields.get("rms_norm_eps", float),
        "attention_bias": fields.flag("attention_bias", False),
        "max_context": fields.size("max_position_embeddings"),
    }


def attention_kind(fields: Fields, name: Any, other: AttentionKind) -> AttentionKind:
    """What an entry of `layer_types` means in a family that has full and `other` layers."""
    known: dict[str, AttentionKind] = {"full_attention": "full", f"{other}_attention": other}
    if name not in known:
        raise MoecliError(
            f"layer type `{name}` in {fields.where} is not supported",
            "supported: " + ", ".join(f"`{kind}`" for kind in known),
        )
    return known[name]
