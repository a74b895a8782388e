"""Tiny random models of families that the library computes: which, how they are made, and saved.

`FAMILIES` is also what docs/models.md lists.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_HYBRID = ["linear_attention", "full_attention"] * 2
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
# By model type: what the tiny config has besides, where the family names it.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": _MLA,
    "bailing_hybrid": {"layer_types": _HYBRID, "mlp_layer_types": _SPARSE} | _MLA,
    "cohere2_moe": {},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {"swiglu_limit": 0.3},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "granitemoe": {"tie_word_embeddings": True},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID, "mlp_layer_types": _SPARSE, "linear_num_heads": 2}
    | _MLA,
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"swiglu_limit": 0.3},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": _HYBRID},
    "solar_open": {},
}

RECURRENT = {  # whose layers, some of them, have a state instead of keys and values
    *("bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe"),
    *("qwen3_5_moe_text", "qwen3_next"),
}


def tiny_model(model_type: str, **changes: object) -> nn.Module:
    """Random weights that 16 bits hold exactly, so large that routing is far from flat."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    small = {key: value for key, value in _SMALL.items() if hasattr(known, key)}
    config = config_class(**(small | FAMILIES[model_type] | changes))
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            scale = 0.5 if "embed" in name or "lm_head" in name else 1.0
            parameter.data = scale * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    model.tie_weights()
    return model


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose class the library has prepared for other implementations of experts."""
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "is_transposed")]


def save(model: nn.Module, directory: Path) -> Path:
    """As a hub has it: the library's own names of the source, in bf16, with a tokenizer."""
    from tests.e2e.tiny import write_tokenizer

    tied: Any = model.all_tied_weights_keys  # those a hub's checkpoint does not have twice
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    halves = {key: t.bfloat16() if t.is_floating_point() else t for key, t in state.items()}
    model.save_pretrained(directory, state_dict=halves)
    write_tokenizer(directory)
    return directory
