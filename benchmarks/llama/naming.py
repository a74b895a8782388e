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
    turned_heads: int | None = None  # GGUF has their rows in another order: see numbers.turned

    @property
    def is_norm(self) -> bool:
        return len(self.shape) == 1

    @property
    def is_router(self) -> bool:
        return self.gguf.endswith("ffn_gate_inp.weight")


@dataclass(frozen=True)
class Family:
    """What the layers of a family are called in a checkpoint, and what they have."""

    block: str
    router: str
    projections: tuple[str, str, str]  # gate, up, down
    head_norms: bool = False
    shared_expert: bool = False
    turned: bool = False  # GGUF wants components that turn together side by side


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {  # by model_type
    "qwen3_moe": Family("mlp", "gate", _PROJECTIONS, head_norms=True),
    "llama4_text": Family("feed_forward", "router", _PROJECTIONS, shared_expert=True),
    "mixtral": Family("block_sparse_moe", "gate", ("w1", "w3", "w2"), turned=True),
}


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
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    family = FAMILIES[config["model_type"]]
    parts: list[tuple[str, str, tuple[int, ...], int | None]] = [
        ("input_layernorm", "attn_norm", (hidden,), None),
        ("self_attn.q_proj", "attn_q", (heads * size, hidden), heads),
        ("self_attn.k_proj", "attn_k", (key_heads * size, hidden), key_heads),
        ("self_attn.v_proj", "attn_v", (key_heads * size, hidden), None),
        ("self_attn.o_proj", "attn_output", (hidden, heads * size), None),
        ("post_attention_layernorm", "ffn_norm", (hidden,), None),
    ]
    if family.head_norms:
        parts += [("self_attn.q_norm", "attn_q_norm", (size,), None)]
        parts += [("self_attn.k_norm", "attn_k_norm", (size,), None)]
    for hf, gguf, shape, turning in parts:
        names = f"model.layers.{layer}.{hf}.weight", f"blk.{layer}.{gguf}.weight"
        yield Named(*names, shape, turned_heads=turning if family.turned else None)


def _experts(config: dict[str, Any], layer: int) -> Iterator[Named]:
    hidden, inner, count = config["hidden_size"], expert_size(config), num_experts(config)
    family = FAMILIES[config["model_type"]]
    hf, gguf = f"model.layers.{layer}.{family.block}", f"blk.{layer}.ffn"
    yield Named(f"{hf}.{family.router}.weight", f"{gguf}_gate_inp.weight", (count, hidden))
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for (part, shape), projection in zip(shapes.items(), family.projections, strict=True):
        for expert in range(count):
            name = f"{hf}.experts.{expert}.{projection}.weight"
            yield Named(name, f"{gguf}_{part}_exps.weight", shape, expert)
        if family.shared_expert:
            name = f"{hf}.shared_expert.{projection}.weight"
            yield Named(name, f"{gguf}_{part}_shexp.weight", shape)
