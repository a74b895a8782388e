"""Knows Hugging Face's field names, old and new, of models that moecli runs. Knows no tensors.

Nobody but the modules `hf_*` knows them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moecli.errors import MoecliError
from moecli.models.config import (
    LayerSpec,
    ModelSpec,
    TemperatureSpec,
    VisionSpec,
)
from moecli.models.hf_deepseek import deepseek_v2, deepseek_v3
from moecli.models.hf_families import FAMILY_READERS
from moecli.models.hf_fields import CONFIG_HINT, Fields, attention_kind, common_of, rope_of

SUPPORTED_HINT = (
    "supported: llama4 (Scout, Maverick and their like), qwen3_moe, mixtral, glm4_moe, gpt_oss, "
    "deepseek_v3, deepseek_v2 (Lite), and most that the installed transformers knows"
)
BITSANDBYTES = "bitsandbytes"


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a parsed config.json; raises MoecliError naming what is wrong with it."""
    architecture = architecture_of(config)
    reader = _READERS.get(architecture)
    if reader is None:
        if not _has_experts(config):
            raise MoecliError(
                f"`{architecture}` is a dense model: it has no experts to quantize or to offload",
                SUPPORTED_HINT,
            )
        kind = config.get("model_type", "no model_type")
        raise MoecliError(
            f"moecli does not know the architecture `{architecture}` ({kind})", SUPPORTED_HINT
        )
    spec = reader(architecture, Fields(config))
    _check(spec)
    return spec


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether `read_spec` is to read it: a family of our own decoder, or no MoE model at all."""
    return has_reader(config) or not _has_experts(config)


def has_reader(config: Mapping[str, Any]) -> bool:
    """Whether our own decoder runs models of this architecture."""
    return architecture_of(config) in _READERS


def architecture_of(config: Mapping[str, Any]) -> str:
    """The name of the model's class in transformers."""
    names = config.get("architectures") or []
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise MoecliError("config.json names neither `architectures` nor `model_type`", CONFIG_HINT)
    return _BY_MODEL_TYPE.get(model_type, model_type)


def _has_experts(config: Mapping[str, Any]) -> bool:
    """Whether any field, nested ones included, counts more than one expert."""
    for key, value in config.items():
        if isinstance(value, dict):
            if _has_experts(value):
                return True
        elif "expert" in key and isinstance(value, (int, float)) and value > 1:
            return True
    return False


def _check(spec: ModelSpec) -> None:
    if not spec.moe_layers:
        raise MoecliError(
            f"this `{spec.architecture}` has no layer with experts to offload", SUPPORTED_HINT
        )
    if spec.num_heads % spec.num_kv_heads:
        raise MoecliError(
            f"`num_attention_heads` ({spec.num_heads}) in config.json is no multiple of "
            f"`num_key_value_heads` ({spec.num_kv_heads})",
            CONFIG_HINT,
        )
    if spec.experts_per_token > spec.num_experts:
        raise MoecliError(
            f"`num_experts_per_tok` ({spec.experts_per_token}) in config.json exceeds the number "
            f"of experts ({spec.num_experts})",
            CONFIG_HINT,
        )
    if spec.head_dim % 2:
        raise MoecliError(
            f"`head_dim` in config.json must be even, not {spec.head_dim}", CONFIG_HINT
        )


def _llama4(architecture: str, top: Fields) -> ModelSpec:
    fields = top.section("text_config") if "text_config" in top.values else top
    count = fields.size("num_hidden_layers")
    layers = _llama4_layers(fields, count)
    chunked = any(layer.attention == "chunked" for layer in layers)
    temperature = None
    if fields.flag("attn_temperature_tuning", True):
        temperature = TemperatureSpec(
            fields.get("floor_scale", float, 8192.0), fields.get("attn_scale", float, 0.1)
        )
    all_moe = all(layer.moe for layer in layers)
    intermediate = fields.size("intermediate_size")
    return ModelSpec(
        **common_of(fields),
        architecture=architecture,
        family="llama4",
        head_dim=fields.size("head_dim", 128),
        layers=layers,
        num_experts=fields.size("num_local_experts"),
        expert_intermediate_size=intermediate,
        shared_intermediate_size=intermediate,
        dense_intermediate_size=0 if all_moe else fields.size("intermediate_size_mlp"),
        router="sigmoid",
        normalize_topk=False,
        weight_on_input=True,
        rope=rope_of(fields, "interleaved"),
        qk_norm="weightless_after_rope" if fields.flag("use_qk_norm", True) else "none",
        chunk_size=fields.size("attention_chunk_size") if chunked else None,
        temperature=temperature,
        tie_word_embeddings=fields.flag(
            "tie_word_embeddings", top.flag("tie_word_embeddings", False)
        ),
        num_vision_params=_vision_params(top, fields.size("hidden_size")),
        vision=_vision(top),
    )


def _llama4_layers(fields: Fields, count: int) -> tuple[LayerSpec, ...]:
    interval = fields.size("no_rope_layer_interval", 4)
    rope = fields.get("no_rope_layers", list, []) or [(i + 1) % interval for i in range(count)]
    kinds = fields.get("layer_types", list, []) or [
        "chunked_attention" if rotates else "full_attention" for rotates in rope
    ]
    for key, values in (("no_rope_layers", rope), ("layer_types", kinds)):
        if len(values) < count:
            raise MoecliError(
                f"`{key}` in {fields.where} has {len(values)} entries for {count} layers",
                CONFIG_HINT,
            )
    step = fields.size("interleave_moe_layer_step", 1)
    moe = fields.get("moe_layers", list, list(range(step - 1, count, step)))
    return tuple(
        LayerSpec(attention_kind(fields, kinds[i], "chunked"), bool(rope[i]), i in moe)
        for i in range(count)
    )


def _vision(top: Fields) -> VisionSpec | None:
    """Llama 4's vision tower; None for a text checkpoint."""
    if not top.get("vision_config", dict, {}):
        return None
    vision = top.section("vision_config")
    token = "image_token_index" if "image_token_index" in top.values else "image_token_id"
    inner, between = vision.size("projector_input_dim"), vision.size("projector_output_dim")
    return VisionSpec(
        patch_token_id=top.size(token, 200092),
        tile_size=vision.size("image_size"),
        patch_size=vision.size("patch_size"),
        shuffle_ratio=vision.get("pixel_shuffle_ratio", float, 0.5),
        num_layers=vision.size("num_hidden_layers"),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        adapter_sizes=(vision.size("intermediate_size"), inner, between),
    )


def _vision_params(top: Fields, text_hidden: int) -> int:
    """Weights of Llama 4's vision tower, adapter and projector; 0 for a text checkpoint."""
    if not top.get("vision_config", dict, {}):
        return 0
    vision = top.section("vision_config")
    hidden, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    patch = vision.size("patch_size")
    patches = (vision.size("image_size") // patch) ** 2 + 1
    attention = 4 * (hidden * hidden + hidden)
    mlp = 2 * hidden * inner + inner + hidden
    layer = attention + mlp + 4 * hidden
    embedding = hidden * (vision.size("num_channels", 3) * patch**2 + patches + 1) + 4 * hidden
    projected = vision.size("projector_output_dim")
    adapter = inner * vision.size("projector_input_dim") + projected * projected
    projector = vision.size("vision_output_dim") * text_hidden
    return vision.size("num_hidden_layers") * layer + embedding + adapter + projector


def _qwen3_moe(architecture: str, fields: Fields) -> ModelSpec:
    if fields.flag("use_sliding_window", False):
        raise MoecliError(
            "moecli does not know the sliding window that `use_sliding_window` asks for",
            "no released Qwen3-MoE uses it",
        )
    count, common = fields.size("num_hidden_layers"), common_of(fields)
    step = fields.size("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", list, [])
    moe = [i not in dense and (i + 1) % step == 0 for i in range(count)]
    experts = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    return ModelSpec(
        **common,
        architecture=architecture,
        family="qwen3_moe",
        head_dim=fields.size("head_dim", common["hidden_size"] // common["num_heads"]),
        layers=tuple(LayerSpec("full", True, is_moe) for is_moe in moe),
        num_experts=fields.size(experts),
        expert_intermediate_size=fields.size("moe_intermediate_size"),
        shared_intermediate_size=0,
        dense_intermediate_size=0 if all(moe) else fields.size("intermediate_size"),
        router="softmax",
        normalize_topk=fields.flag("norm_topk_prob", False),
        weight_on_input=False,
        rope=rope_of(fields, "half"),
        qk_norm="weighted_before_rope",
        chunk_size=None,
        temperature=None,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


_READERS: dict[str, Callable[[str, Fields], ModelSpec]] = {
    "Llama4ForConditionalGeneration": _llama4,
    "Llama4ForCausalLM": _llama4,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    **FAMILY_READERS,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
}
_BY_MODEL_TYPE = {
    "llama4": "Llama4ForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def source_scheme(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint with this config.json is quantized, for people; None where it is not."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        return "unknown"
    in_8_bits, in_4_bits = (
        quantization.get(f"load_in_{bits}bit") or quantization.get(f"_load_in_{bits}bit")
        for bits in (8, 4)
    )
    default = BITSANDBYTES if in_8_bits or in_4_bits else "unknown"
    method = str(quantization.get("quant_method", default))
    if method != BITSANDBYTES:
        return method
    if in_8_bits:
        return f"{BITSANDBYTES} llm-int8"
    doubly = ", double quantization" if quantization.get("bnb_4bit_use_double_quant") else ""
    return f"{BITSANDBYTES} {quantization.get('bnb_4bit_quant_type', 'fp4')}{doubly}"


def without_prediction(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model less its layers that predict later tokens than the next.

    It says that there are none: libraries expect some where it says nothing.
    """
    return {**config, "num_nextn_predict_layers": 0}
