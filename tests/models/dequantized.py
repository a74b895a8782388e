"""The model of transformers with the weights that moecli has quantized, expanded again."""

import json
from pathlib import Path

import torch
from torch import Tensor

from quant.checkpoint import QuantizedCheckpoint
from quant.layout import ExpertWeights
from quant.quantize import dequantize
from quant.tensor import QuantizedWeight
from tests.models.families import FAMILIES


def dequantized(path: Path) -> torch.nn.Module:
    """What the library itself makes of a directory that moecli wrote, in fp32.

    Where it cannot read experts so written, they are put together here as its own are.
    """
    import transformers

    config = json.loads((path / "config.json").read_text())
    if FAMILIES[config["model_type"].removesuffix("_text")].library_reads:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = _fused_again(path, config)
    for parameter in model.parameters():  # fused experts stay bf16 whatever is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.eval()


def expert_of(checkpoint: QuantizedCheckpoint, layer: int, expert: int) -> ExpertWeights:
    file, offset, nbytes = checkpoint.expert_span(layer, expert)
    blob = torch.frombuffer(bytearray(file.read_bytes()[offset:][:nbytes]), dtype=torch.uint8)
    return checkpoint.layout.views(blob)


def _fused_again(path: Path, config: dict) -> torch.nn.Module:
    """gpt-oss: [E, in, out], columns of gate and up in turn."""
    import transformers

    checkpoint = QuantizedCheckpoint.open(path)
    del config["quantization_config"]
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class(**config))
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        last = name.rpartition(".")[2]
        if last not in ("gate_up_proj", "down_proj"):
            found = checkpoint.dense(name)
            state[name] = dequantize(found) if isinstance(found, QuantizedWeight) else found
            continue
        layer = int(name.split(".")[2])
        experts = [expert_of(checkpoint, layer, e) for e in range(checkpoint.num_experts(layer))]
        parts = [[dequantize(part).T for part in (one.gate, one.up, one.down)] for one in experts]
        if last == "down_proj":
            state[name] = torch.stack([down for _, _, down in parts])
        else:
            pairs = [torch.stack((gate, up), dim=-1).flatten(-2) for gate, up, _ in parts]
            state[name] = torch.stack(pairs)
    model.load_state_dict(state)
    return model
