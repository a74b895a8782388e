"""Small checkpoints to convert, written with the safetensors library, and jobs for them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.items import DenseItem, ExpertItem, TensorSlice
from quant.job import ConversionJob
from quant.pack_quantized import quantization_config
from quant.scheme import QuantScheme

HIDDEN, INTERMEDIATE, VOCAB = 64, 96, 40


def random_weights(
    fused: bool, num_layers: int = 2, num_experts: int = 4, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """A MoE of tiny size, experts fused as in Llama 4 (transposed) or one Linear each."""
    generator = torch.Generator().manual_seed(num_experts)

    def new(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 8).to(dtype)

    weights = {"embed.weight": new(VOCAB, HIDDEN), "norm.weight": new(HIDDEN)}
    for layer in range(num_layers):
        weights[f"layers.{layer}.q_proj.weight"] = new(128, HIDDEN)
        weights[f"layers.{layer}.o_proj.weight"] = new(HIDDEN, 128)
        weights[f"layers.{layer}.router.weight"] = new(num_experts, HIDDEN)
        experts = f"layers.{layer}.experts"
        if fused:
            weights[f"{experts}.gate_up_proj"] = new(num_experts, HIDDEN, 2 * INTERMEDIATE)
            weights[f"{experts}.down_proj"] = new(num_experts, INTERMEDIATE, HIDDEN)
            continue
        for expert in range(num_experts):
            weights[f"{experts}.{expert}.gate_proj.weight"] = new(INTERMEDIATE, HIDDEN)
            weights[f"{experts}.{expert}.up_proj.weight"] = new(INTERMEDIATE, HIDDEN)
            weights[f"{experts}.{expert}.down_proj.weight"] = new(HIDDEN, INTERMEDIATE)
    return weights


def write_source(path: Path, weights: dict[str, Tensor], num_files: int = 1) -> Checkpoint:
    """Write a checkpoint directory with a tokenizer beside it, and open it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "test"}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    if num_files == 1:
        save_file(weights, path / "model.safetensors")
        return Checkpoint.open(path)
    weight_map = {}
    for number in range(num_files):
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::num_files]}
        save_file(part, path / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return Checkpoint.open(path)


def expert_item(layer: int, expert: int, fused: bool) -> ExpertItem:
    experts = f"layers.{layer}.experts"
    prefix = f"{experts}.{expert}"
    if fused:
        both = f"{experts}.gate_up_proj"
        gate = TensorSlice(both, expert, True, (0, INTERMEDIATE))
        up = TensorSlice(both, expert, True, (INTERMEDIATE, 2 * INTERMEDIATE))
        return ExpertItem(
            layer, expert, prefix, gate, up, TensorSlice(f"{experts}.down_proj", expert, True)
        )
    parts = (TensorSlice(f"{prefix}.{kind}_proj.weight") for kind in ("gate", "up", "down"))
    return ExpertItem(layer, expert, prefix, *parts)


def make_job(
    source: Checkpoint,
    out: Path,
    fused: bool,
    scheme: QuantScheme = QuantScheme(4, 32),  # noqa: B008 frozen
    dense_scheme: QuantScheme | None = QuantScheme(8, 64),  # noqa: B008 frozen
    shard_nbytes: int = 5 * 10**9,
) -> ConversionJob:
    """A job for what `random_weights` has made."""
    layers = sum(name.endswith("router.weight") for name in source.tensors)
    num_experts = source.tensors["layers.0.router.weight"].shape[0]
    experts = tuple(
        expert_item(layer, expert, fused)
        for layer in range(layers)
        for expert in range(num_experts)
    )
    dense = []
    for name in source.tensors:
        if ".experts." in name:
            continue
        linear = name.removesuffix(".weight")
        quantized = dense_scheme is not None and linear.endswith(("q_proj", "o_proj"))
        dense.append(
            DenseItem(linear, TensorSlice(name), dense_scheme)
            if quantized
            else DenseItem(name, TensorSlice(name), None)
        )
    config = dict(source.config)
    config["quantization_config"] = quantization_config(scheme, dense_scheme, ["re:.*router$"])
    return ConversionJob(
        source, out, scheme, dense_scheme, experts, tuple(dense), config,
        ("tokenizer.json",), shard_nbytes,
    )  # fmt: skip


def expert_matrices(weights: dict[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
    """gate, up [intermediate, hidden], down [hidden, intermediate] of the source."""
    experts = f"layers.{layer}.experts"
    if f"{experts}.gate_up_proj" in weights:
        both = weights[f"{experts}.gate_up_proj"][expert].t()
        gate, up = both[:INTERMEDIATE], both[INTERMEDIATE:]
        return {"gate": gate, "up": up, "down": weights[f"{experts}.down_proj"][expert].t()}
    return {
        kind: weights[f"{experts}.{expert}.{kind}_proj.weight"] for kind in ("gate", "up", "down")
    }


def tree_bytes(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*"))}
