"""A tiny random Llama 4 that sees: its checkpoint, as the library saves it, and picture files."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.vision.pictures import pattern

SPECIALS = [
    *("<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|image_start|>"),
    *("<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>"),
]
IDS = {name: 256 + index for index, name in enumerate(SPECIALS)}
VOCAB = 256 + len(SPECIALS)
TILE, MOST, TILE_TOKENS = 56, 6, 4
CONFIG: dict[str, Any] = {
    "image_token_index": IDS["<|patch|>"],
    "boi_token_index": IDS["<|image_start|>"],
    "eoi_token_index": IDS["<|image_end|>"],
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_chunk_size": 32,
        "no_rope_layers": [1, 1, 1, 0],
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": IDS["<|begin_of_text|>"],
        "eos_token_id": IDS["<|eot|>"],
        "pad_token_id": IDS["<|eot|>"],
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": 14,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "vision_output_dim": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def write_checkpoint(directory: Path) -> Path:
    """What a hub's repository holds, in bf16."""
    import transformers
    from transformers.models.llama4.processing_llama4 import chat_template

    model = transformers.Llama4ForConditionalGeneration(transformers.Llama4Config(**CONFIG))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.3 * noise
        else:
            fan_in = parameter.shape[1] if "experts" in name else parameter.shape[-1]
            embeds = any(part in name for part in ("embed_tokens", "positional", "projector"))
            parameter.data = noise if embeds else 1.2 * noise * fan_in**-0.5
        parameter.data = parameter.data.bfloat16()  # the buffers stay: some are complex
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory)
    _write_tokenizer(directory, chat_template)
    processor = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "size": {"height": TILE, "width": TILE},
        "max_patches": MOST,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def _write_tokenizer(directory: Path, chat_template: str) -> None:
    """Bytes and special tokens, with the template that the library has for Llama 4."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "chat_template": chat_template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_picture(path: Path, height: int, width: int, seed: int = 0) -> Path:
    """A lossless file of `pattern`."""
    pixels = pattern(height, width, seed).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)
    return path
