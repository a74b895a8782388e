"""Knows how a model of random weights is written as GGUF, and what a token reads of one.

Runs in the peer's Python: gguf and NumPy, nothing of moecli's.
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.llama.naming import Named, expert_size, num_experts, tensors
from benchmarks.llama.numbers import Numbers, turned

BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
_EMBEDDING = "token_embd.weight"


def write_gguf(arch: str, config: dict[str, Any], path: Path) -> None:
    """All matrices in bf16, norms and routers in fp32, as llama.cpp's own converter has them."""
    writer = gguf.GGUFWriter(path, arch)
    _write_fields(writer, config)
    stacked = [(name, list(same)) for name, same in groupby(tensors(config), lambda t: t.gguf)]
    for name, parts in stacked:
        shape = (len(parts), *parts[0].shape) if parts[0].expert is not None else parts[0].shape
        kind = F32 if _in_fp32(parts[0]) else BF16
        size = (4 if kind == F32 else 2) * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    numbers = Numbers()
    for _, parts in stacked:
        writer.write_tensor_data(_values(numbers, parts))
    writer.close()


def _in_fp32(tensor: Named) -> bool:
    return tensor.is_norm or tensor.is_router


def _values(numbers: Numbers, parts: Iterable[Named]) -> np.ndarray:
    found = [_value(numbers, part) for part in parts]
    return found[0] if len(found) == 1 else np.stack(found)


def _value(numbers: Numbers, part: Named) -> np.ndarray:
    value = numbers.fp32(part) if _in_fp32(part) else numbers.bf16(part)
    return value if part.turned_heads is None else turned(value, part.turned_heads)


def _write_fields(writer: "gguf.GGUFWriter", config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(expert_size(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if "interleave_moe_layer_step" in config:
        writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])


def sizes(path: Path, experts_used: int) -> dict[str, Any]:
    """Bytes, those that a token reads, bits a weight, and which types llama.cpp chose.

    The input embedding is left out: a token reads one row of it.
    """
    read = weights = nbytes = 0.0
    types: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        size, name = int(tensor.n_bytes), tensor.name
        if name == _EMBEDDING:
            continue
        weights, nbytes = weights + int(tensor.n_elements), nbytes + size
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + size
        is_expert = name.endswith("_exps.weight")
        read += size * experts_used / int(tensor.shape[-1]) if is_expert else size
    return {
        "nbytes": int(nbytes),
        "read_nbytes": read,
        "bits_a_weight": 8 * nbytes / weights,
        "nbytes_by_type": types,
    }
