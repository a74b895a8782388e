"""What of a checkpoint is not converted, and whether that is said."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moecli.conversion import quantize_model
from quant.checkpoint import Checkpoint
from quant.scheme import QuantScheme
from tests.e2e import tiny

INT4 = QuantScheme(4, 32)


def test_layers_that_predict_later_tokens_are_left_out_aloud(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny.qwen3_config(), tiny.qwen3_tensors())
    said: list[str] = []
    quantize_model(source, tmp_path / "plain", INT4, INT4, notify=said.append)
    assert not said
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.{tiny.LAYERS}.eh_proj.weight"] = torch.zeros(8, 8).bfloat16()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize_model(source, tmp_path / "out", INT4, INT4, notify=said.append)
    assert len(said) == 1
    assert f"beyond the model's {tiny.LAYERS} are left out (1 tensors)" in said[0]
    plain, out = (Checkpoint.open(tmp_path / name) for name in ("plain", "out"))
    assert set(plain.tensors) == set(out.tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("num_nextn_predict_layers") == 0
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
