"""Knows how a training checkpoint becomes a Llama 4 text repository: names, shapes, json files."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from demo_model import DemoConfig
from demo_tokenizer import BOS, CHAT_TEMPLATE, EOT, PAD, load_tokenizer

BYTES_ALLOWED = 32_000_000


def hf_config(c: DemoConfig, ids: dict[str, int]) -> dict:
    layers = range(c.num_layers)
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": c.chunk_size,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "bos_token_id": ids[BOS],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids[EOT]],
        "pad_token_id": ids[PAD],
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "moe_layers": list(layers),
        "intermediate_size": c.intermediate_size,
        "intermediate_size_mlp": 2 * c.intermediate_size,
        "layer_types": [
            "chunked_attention" if c.uses_rope(i) else "full_attention" for i in layers
        ],
        "no_rope_layers": [int(c.uses_rope(i)) for i in layers],
        "max_position_embeddings": c.max_positions,
        "num_attention_heads": c.num_heads,
        "num_experts_per_tok": 1,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "num_local_experts": c.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.0003,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": c.vocab_size,
    }


def hf_tensors(c: DemoConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Training names to Llama 4 names, in bf16; expert tensors have the same layout in both."""
    width_q, width_kv, inner = (
        c.num_heads * c.head_dim,
        c.num_kv_heads * c.head_dim,
        c.intermediate_size,
    )
    out = {"model.embed_tokens.weight": weights["embedding"]}
    for i in range(c.num_layers):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        to, moe = f"model.layers.{i}", f"model.layers.{i}.feed_forward"
        q, k, v = w["qkv"].split([width_q, width_kv, width_kv])
        gate, up = w["shared_gate_up"].split([inner, inner])
        out |= {
            f"{to}.input_layernorm.weight": w["input_norm"],
            f"{to}.self_attn.q_proj.weight": q,
            f"{to}.self_attn.k_proj.weight": k,
            f"{to}.self_attn.v_proj.weight": v,
            f"{to}.self_attn.o_proj.weight": w["o"],
            f"{to}.post_attention_layernorm.weight": w["post_norm"],
            f"{moe}.router.weight": w["router"],
            f"{moe}.experts.gate_up_proj": w["gate_up"],
            f"{moe}.experts.down_proj": w["down"],
            f"{moe}.shared_expert.gate_proj.weight": gate,
            f"{moe}.shared_expert.up_proj.weight": up,
            f"{moe}.shared_expert.down_proj.weight": w["shared_down"],
        }
    out["model.norm.weight"] = weights["norm"]
    return {n: t.to(torch.bfloat16).contiguous() for n, t in out.items()}


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write_tokenizer(source: Path, out: Path, c: DemoConfig) -> dict[str, int]:
    """tokenizer.json, its config and the chat template; returns the ids of the special tokens."""
    tokenizer = load_tokenizer(source)
    shutil.copyfile(source, out / "tokenizer.json")
    added = {
        str(i): {
            "content": t.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, t in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    write_json(
        out / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "bos_token": BOS,
            "eos_token": EOT,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": c.max_positions,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        out / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {t["content"]: int(i) for i, t in added.items()}


def export(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Write a complete repository beside out, then move its files into place."""
    from safetensors.torch import save_file

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = DemoConfig(**state["config"])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder)
        ids = write_tokenizer(tokenizer, part, config)
        write_json(part / "config.json", hf_config(config, ids))
        write_json(
            part / "generation_config.json",
            {
                "bos_token_id": ids[BOS],
                "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids[EOT]],
                "pad_token_id": ids[PAD],
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
            },
        )
        tensors = hf_tensors(config, state["optimiser"]["master"])
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        size = (part / "model.safetensors").stat().st_size
        assert size <= BYTES_ALLOWED, f"model.safetensors has {size} bytes"
        for path in part.iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)
    print(f"{out}: step {state['step']}, {state['tokens']} tokens, {size} bytes")
