"""Makes tiny random checkpoints that look like those of a hub; knows no moecli code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTER, EXPERTS, VOCAB = 64, 32, 4, 320
HEADS, KV_HEADS, HEAD_DIM, LAYERS, CHUNK = 4, 2, 16, 4, 32
SPECIALS = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\n\n"
    "{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def llama4_config() -> dict[str, Any]:
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "intermediate_size_mlp": 2 * INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": CHUNK,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "no_rope_layers": [1, 1, 1, 0],
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 256,
        "eos_token_id": [257],
        "pad_token_id": 257,
        "torch_dtype": "bfloat16",
    }


def llama4_tensors(
    seed: int = 0, experts: int = EXPERTS, inner: int = INTER
) -> dict[str, torch.Tensor]:
    """bf16 tensors of the tiny Llama 4, fused as in a hub's repository."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    tensors = {
        "model.embed_tokens.weight": rand(VOCAB, HIDDEN, scale=1.0),
        "lm_head.weight": rand(VOCAB, HIDDEN, scale=0.3),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            p + "post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            p + "self_attn.q_proj.weight": rand(HEADS * HEAD_DIM, HIDDEN),
            p + "self_attn.k_proj.weight": rand(KV_HEADS * HEAD_DIM, HIDDEN),
            p + "self_attn.v_proj.weight": rand(KV_HEADS * HEAD_DIM, HIDDEN),
            p + "self_attn.o_proj.weight": rand(HIDDEN, HEADS * HEAD_DIM),
            p + "feed_forward.router.weight": rand(experts, HIDDEN, scale=1.0),
            p + "feed_forward.experts.gate_up_proj": rand(experts, HIDDEN, 2 * inner),
            p + "feed_forward.experts.down_proj": rand(experts, inner, HIDDEN),
            p + "feed_forward.shared_expert.gate_proj.weight": rand(inner, HIDDEN),
            p + "feed_forward.shared_expert.up_proj.weight": rand(inner, HIDDEN),
            p + "feed_forward.shared_expert.down_proj.weight": rand(HIDDEN, inner),
        }
    return tensors


def qwen3_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * INTER,
        "moe_intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "bfloat16",
    }


def qwen3_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """bf16 tensors of the tiny Qwen3-MoE: as Llama 4's where they agree, experts unfused."""
    tensors = llama4_tensors(seed)
    for name in [name for name in tensors if ".feed_forward." in name]:
        tensor = tensors.pop(name)
        layer = name.split(".")[2]
        module = f"model.layers.{layer}.mlp"
        if name.endswith("router.weight"):
            tensors[f"{module}.gate.weight"] = tensor
        for expert in range(EXPERTS):
            path = f"{module}.experts.{expert}"
            if name.endswith("gate_up_proj"):
                tensors[f"{path}.gate_proj.weight"] = tensor[expert, :, :INTER].t().contiguous()
                tensors[f"{path}.up_proj.weight"] = tensor[expert, :, INTER:].t().contiguous()
            if name.endswith("experts.down_proj"):
                tensors[f"{path}.down_proj.weight"] = tensor[expert].t().contiguous()
    for layer in range(LAYERS):
        for norm in ("q_norm", "k_norm"):
            name = f"model.layers.{layer}.self_attn.{norm}.weight"
            tensors[name] = torch.ones(HEAD_DIM).bfloat16()
    return tensors


def write_tokenizer(
    directory: Path,
    specials: Sequence[str] = SPECIALS,
    template: str = TEMPLATE,
    stops: Sequence[str] = SPECIALS[1:2],
    texts: Sequence[str] = (),
) -> None:
    """A byte-level tokenizer without merges, special tokens from 256 on, and a chat template.

    The first special token begins a text, the first of `stops` ends it; `texts` are added tokens
    that are not special.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in texts])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": specials[0], "eos_token": stops[0], "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = [tokenizer.token_to_id(name) for name in stops]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def write_checkpoint(
    directory: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    shards: int = 1,
) -> Path:
    """A complete source directory; several shards are filled in the order of the names."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config or llama4_config()))
    _write_weights(directory, tensors or llama4_tensors(), shards)
    write_tokenizer(directory)
    return directory


def _write_weights(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        begin, end = (len(names) * n // shards for n in (number, number + 1))
        file_name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[begin:end]}
        save_file(part, directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
