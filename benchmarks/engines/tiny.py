"""Makes tiny random models, as transformers saves them; knows neither moecli nor any engine.

Sizes are such that groups of 128 divide every row, also when two ranks share it, and that an
expert is no multiple of 4096 bytes, so that moecli writes fillers.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[2] / "moecli" / "demo"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
VOCAB = 3840  # the embedded model's, whose tokenizer is taken
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 3824, "eos_token_id": 3825, "pad_token_id": 3831,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 256, "intermediate_size": 256, "norm_topk_prob": True},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
         "intermediate_size": 256, "sliding_window": None},
    ),
    "llama4": (
        "Llama4TextConfig",
        {"num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 1,
         "intermediate_size": 256, "intermediate_size_mlp": 512, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 128, "use_qk_norm": True},
    ),
}  # fmt: skip


def write_model(family: str, out: Path, **changes: object) -> Path:
    """A directory in bf16 with tokenizer, once; its logits and choices of experts are not flat."""
    import transformers

    if out.exists():
        return out
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, kind)(**(SIZES | sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = _scaled(name, noise, config).bfloat16()
    model.tie_weights()
    _make_choices_clear(model, generator)
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / name, partial / name)
    partial.rename(out)
    return out


def _make_choices_clear(model: Any, generator: torch.Generator) -> None:
    """Each token wants two experts far more than all others, whatever the layers do to it.

    With random routers some choices hang on the last bit, and a layer that rounds otherwise takes
    another expert: then two right engines differ by far more than rounding.
    """
    embedding = model.get_input_embeddings().weight
    routers = [
        p
        for name, p in model.named_parameters()
        if name.endswith((".gate.weight", "router.weight"))
    ]
    experts, hidden = routers[0].shape
    directions = torch.linalg.qr(torch.randn(hidden, experts, generator=generator)).Q.T  # [E, H]
    token = torch.arange(len(embedding))
    first, second = token % experts, (token + 1 + token // experts % (experts - 1)) % experts
    embedding.data += (12 * directions[first] + 8 * directions[second]).bfloat16()
    for router in routers:
        router.data = (0.3 * directions).bfloat16()


def _scaled(name: str, noise: torch.Tensor, config: Any) -> torch.Tensor:
    """Weights of a size that keeps the hidden state's, and makes logits of magnitude 4."""
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if "embed" in name:
        return noise
    if noise.ndim == 3:  # fused experts, with either dimension last
        gate_up = "gate_up" in name
        return noise * (config.hidden_size if gate_up else config.intermediate_size) ** -0.5
    return noise * (4 if "lm_head" in name else 1) * noise.shape[-1] ** -0.5
