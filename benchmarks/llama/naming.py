"""Knows every tensor of a model by both names, a checkpoint's and GGUF's; knows no values.

Standard library only: moecli's Python and llama.cpp's both import it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """One tensor of the checkpoint; GGUF holds all experts of a layer in one."""

    hf: str
    gguf: str
    shape: tuple[int, ...]
    expert: int | None = None

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1

    @property
    def is_router(self) -> bool:
        return self.gguf.endswith("ffn_gate_inp.weight")


def num_experts(config: dict[str, Any]) -> int:
    return config.get("num_experts") or config["num_local_experts"]


def expert_size(config: dict[str, Any]) -> int:
    """Rows of an expert's gate."""
    return config.get("moe_intermediate_size") or config["intermediate_size"]


def tensors(config: dict[str, Any]) -> Iterator[Named]:
    """In the order of GGUF: experts of one tensor follow each other."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield Named("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        yield from _attention(config, layer)
        yield from _experts(config, layer)
    yield Named("model.norm.weight", "output_norm.weight", (hidden,))
    yield Named("lm_head.weight", "output.weight", (vocab, hidden))


def _attention(config: dict[str, Any], layer: int) -> Iterator[Named]:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    parts = [
        ("input_layernorm", "attn_norm", (hidden,)),
        ("self_attn.q_proj", "attn_q", (queries, hidden)),
        ("self_attn.k_proj", "attn_k", (keys, hidden)),
        ("self_attn.v_proj", "attn_v", (keys, hidden)),
        ("self_attn.o_proj", "attn_output", (hidden, queries)),
        ("post_attention_layernorm", "ffn_norm", (hidden,)),
    ]
    if config["model_type"] == "qwen3_moe":
        parts += [("self_attn.q_norm", "attn_q_norm", (size,))]
        parts += [("self_attn.k_norm", "attn_k_norm", (size,))]
    for hf, gguf, shape in parts:
        yield Named(f"model.layers.{layer}.{hf}.weight", f"blk.{layer}.{gguf}.weight", shape)


def _experts(config: dict[str, Any], layer: int) -> Iterator[Named]:
    hidden, inner, count = config["hidden_size"], expert_size(config), num_experts(config)
    is_qwen3 = config["model_type"] == "qwen3_moe"
    block, router = ("mlp", "gate") if is_qwen3 else ("feed_forward", "router")
    hf, gguf = f"model.layers.{layer}.{block}", f"blk.{layer}.ffn"
    yield Named(f"{hf}.{router}.weight", f"{gguf}_gate_inp.weight", (count, hidden))
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for part, shape in shapes.items():
        for expert in range(count):
            name = f"{hf}.experts.{expert}.{part}_proj.weight"
            yield Named(name, f"{gguf}_{part}_exps.weight", shape, expert)
        if not is_qwen3:
            name = f"{hf}.shared_expert.{part}_proj.weight"
            yield Named(name, f"{gguf}_{part}_shexp.weight", shape)
