"""Writes models of any size with made-up weights, in moecli's own format; knows no measurement.

What is measured with them is where bytes go and how long that takes; what they say is noise.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moecli.models.config import ModelSpec
from moecli.models.naming import plan_conversion
from quant.checkpoint import Checkpoint, TensorInfo
from quant.manifest import MANIFEST_FILE, FileRecord, Manifest
from quant.pack_quantized import quantization_config
from quant.scheme import QuantScheme
from quant.shards import OutputPlan, OutputTensor, Unit, plan_output

EXPERTS, DENSE = QuantScheme(4, 32), QuantScheme(8, 128)
_SHARD_NBYTES = 4 << 30
_BLOCK_NBYTES = 64 << 20
DEMO = Path(__file__).resolve().parent.parent / "moecli" / "demo"


def qwen3_config(
    layers: int, hidden: int, inner: int, experts: int, top_k: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """A Qwen3-MoE of these sizes with the vocabulary of the embedded model."""
    demo = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        **{name: demo[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")},
    }


def write_model(path: Path, config: dict[str, Any]) -> Path:
    """A directory as `moecli quantize` would write it, once; checksums are not those of the files.

    Experts are INT4 in groups of 32, other linears INT8 in groups of 128.
    """
    if path.exists():
        return path
    spec = ModelSpec.from_hf(config)
    shapes = _shapes(spec)
    infos = {
        name: TensorInfo(path, torch.bfloat16, shape, 0, 2 * torch.Size(shape).numel())
        for name, shape in shapes.items()
    }
    source = Checkpoint(path, config, {}, infos)
    conversion = plan_conversion(spec, shapes, DENSE)
    plan = plan_output(source, EXPERTS, conversion.experts, conversion.dense, _SHARD_NBYTES)
    quantization = quantization_config(EXPERTS, DENSE, conversion.ignore)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(partial, plan)
    contents = {
        "config.json": config | {"quantization_config": quantization},
        "model.safetensors.index.json": {
            "weight_map": {name: shard.name for shard in plan.shards for name in shard.entries}
        },
    }
    for name, content in contents.items():
        (partial / name).write_text(json.dumps(content), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, partial / name)
    files = {shard.name: FileRecord(shard.nbytes, "0" * 64) for shard in plan.shards}
    experts = {layer: tuple(table) for layer, table in plan.experts.items()}
    manifest = Manifest("made up", "made up", plan.layout, DENSE, {}, files, experts)
    (partial / MANIFEST_FILE).write_bytes(manifest.encode())
    partial.rename(path)
    return path


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a source checkpoint, by Qwen3-MoE's names."""
    outer = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    inner = {
        **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm")},
        **{"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"},
        "router": "mlp.gate",
    }
    found: dict[str, tuple[int, ...]] = {}
    for tensor in spec.dense_tensors:
        name = outer.get(tensor.name)
        if name is None:
            _, layer, part = tensor.name.split(".")
            name = f"model.layers.{layer}.{inner[part]}"
        found[f"{name}.weight"] = tensor.shape
    hidden, rows = spec.hidden_size, spec.expert_intermediate_size
    for layer in spec.moe_layers:
        for expert in range(spec.num_experts):
            module = f"model.layers.{layer}.mlp.experts.{expert}"
            found[f"{module}.gate_proj.weight"] = (rows, hidden)
            found[f"{module}.up_proj.weight"] = (rows, hidden)
            found[f"{module}.down_proj.weight"] = (hidden, rows)
    return found


def _write_shards(folder: Path, plan: OutputPlan) -> None:
    noise = memoryview(torch.randint(256, (_BLOCK_NBYTES,), dtype=torch.uint8).numpy())
    start = 0
    for shard in plan.shards:
        with (folder / shard.name).open("wb") as file:
            for unit in shard.units:
                start = (start + 7919 * 64) % (_BLOCK_NBYTES // 2)  # no two experts alike
                for block in _bytes_of(unit, noise, start):
                    file.write(block)


def _bytes_of(unit: Unit, noise: memoryview, start: int) -> Iterator[bytes | memoryview]:
    if unit.source is None:
        yield unit.constant
        return
    for tensor in unit.tensors:
        if tensor.dtype == torch.int32:
            for begin in range(0, tensor.nbytes, _BLOCK_NBYTES // 2):
                yield noise[start : start + min(_BLOCK_NBYTES // 2, tensor.nbytes - begin)]
        else:
            yield _floats(tensor)


def _floats(tensor: OutputTensor) -> memoryview:
    """Scales of codes that are all as likely, so that products keep the size of what they are of;
    norms of one; routers, and embeddings of size one."""
    if tensor.name.endswith("weight_scale"):
        scheme = EXPERTS if ".experts." in tensor.name else DENSE
        inputs = tensor.shape[-1] * scheme.group_size
        spread = ((4**scheme.bits - 1) / 12) ** 0.5
        values = torch.full(tensor.shape, inputs**-0.5 / spread, dtype=torch.bfloat16)
    elif len(tensor.shape) == 1:
        values = torch.ones(tensor.shape, dtype=torch.bfloat16)
    else:
        size = 1.0 if "embed_tokens" in tensor.name else tensor.shape[-1] ** -0.5
        values = torch.randn(tensor.shape).mul_(size).bfloat16()
    return memoryview(values.view(torch.uint8).flatten().numpy())
