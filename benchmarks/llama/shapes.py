"""Knows which models are compared with llama.cpp: real layers, but few, and a small vocabulary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.sizes import QWEN3_30B, SCOUT

RELEASED = Path(__file__).parents[2] / "moecli" / "released"
_VOCAB = 32000


@dataclass(frozen=True)
class Shape:
    """A model of random weights. `config` is what its config.json would say."""

    name: str
    arch: str  # as GGUF calls it
    config: dict[str, Any]
    note: str = ""


def _qwen3(**changes: Any) -> dict[str, Any]:
    return {**QWEN3_30B, "vocab_size": _VOCAB, **changes}


def _scout(**changes: Any) -> dict[str, Any]:
    config = {**SCOUT["text_config"], "architectures": ["Llama4ForCausalLM"]}
    return {**config, "vocab_size": _VOCAB, **changes}


def _mixtral(**changes: Any) -> dict[str, Any]:
    config = json.loads((RELEASED / "mixtral-8x7b.json").read_text(encoding="utf-8"))
    return {**config, "head_dim": 128, "vocab_size": _VOCAB, **changes}


SHAPES = (
    Shape("qwen3-30b-a3b", "qwen3moe", _qwen3(num_hidden_layers=6), "6 of 48 layers"),
    Shape("scout", "llama4", _scout(num_hidden_layers=4), "4 of 48 layers"),
    Shape("mixtral-8x7b", "llama", _mixtral(num_hidden_layers=2), "2 of 32 layers"),
)
# For trying the scripts: figures mean nothing.
TINY = (
    Shape(
        "tiny-qwen3",
        "qwen3moe",
        _qwen3(
            **{"num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 512},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
            **{"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512},
        ),
    ),
    Shape(
        "tiny-scout",
        "llama4",
        _scout(
            **{"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
            **{"num_local_experts": 4, "vocab_size": 512, "intermediate_size_mlp": 512},
        ),
    ),
    Shape(
        "tiny-mixtral",
        "llama",
        _mixtral(
            **{"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
            **{"vocab_size": 512},
        ),
    ),
)
