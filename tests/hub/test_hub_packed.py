"""Packed checkpoints by the command: from a directory and from a stand-in hub, with the parts of a
weight in different files. The result is that of the floats that they stand for.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecli.conversion import quantize_from_hub, quantize_model
from moecli.hub.client import Caller
from quant.bnb import load
from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.scheme import QuantScheme
from quant.sources.opening import open_source
from tests.commands import Command
from tests.e2e import tiny
from tests.hub.standin import Repo, StandInHub
from tests.quant.packed_formats import PACKINGS, Packing

INT4, INT8 = QuantScheme(4, 32), QuantScheme(8, 32)
FORMS = ("gptq-act-order", "awq", "fp8-block", "int4-asymmetric", "fp8-channel", "nf4")
REPO = "org/packed"
_FILES = 5


@pytest.fixture(autouse=True)
def _short_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first range of these small files is all of them."""
    monkeypatch.setattr("moecli.hub.streaming._FIRST_NBYTES", 8192)


def nf4() -> Packing:
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    def pack(module: str, shape: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        codes, state = load().quantize_4bit(weight, quant_type="nf4")
        name = f"{module}.weight"
        parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        state.shape = torch.Size([weight.numel()])
        return {name: codes} | parts, load().dequantize_4bit(codes, state).view(shape)

    return Packing(said, pack)


def packed_model(form: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Config, tensors and values of a Qwen3-MoE with every projection packed."""
    packing = nf4() if form == "nf4" else PACKINGS[form]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(tiny.qwen3_tensors().items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = values[name] = weight
            continue
        module, shape = name.removesuffix(".weight"), (weight.shape[0], weight.shape[1])
        parts, values[name] = packing.pack(module, shape, number)
        tensors |= parts
    return {**tiny.qwen3_config(), "quantization_config": packing.config}, tensors, values


def write(path: Path, form: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose files each have every fifth tensor: hardly a weight lies in one file."""
    config, tensors, values = packed_model(form)
    names = sorted(tensors)
    scattered = [name for start in range(_FILES) for name in names[start::_FILES]]
    place = {name: f"{number:05}" for number, name in enumerate(scattered)}
    tiny.write_checkpoint(path, config, {f"{place[n]}|{n}": t for n, t in tensors.items()}, _FILES)
    return rename(path), values


def rename(path: Path) -> Path:
    """Take the numbers that ordered tensors over the files from their names again."""
    from safetensors.torch import load_file, save_file

    weight_map = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = {name.partition("|")[2]: t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def same_tensors(found: Path, expected: Path) -> None:
    ours, wanted = Checkpoint.open(found), Checkpoint.open(expected)
    assert set(ours.tensors) == set(wanted.tensors)
    for name in wanted.tensors:
        assert torch.equal(ours.read(name), wanted.read(name)), name
    QuantizedCheckpoint.open(found).verify()


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_checkpoint_by_the_command(
    moecli: Command, hub: StandInHub, tmp_path: Path, form: str
) -> None:
    path, values = write(tmp_path / "packed", form)
    floats = tiny.write_checkpoint(tmp_path / "floats", tiny.qwen3_config(), values)
    quantize_model(floats, tmp_path / "expected", INT4, INT8)
    outcome = moecli("quantize", path, "-q", "int4", "--dense", "int8-g32", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    source_form = open_source(path).form
    assert f"the source is {source_form}: its errors and the new ones add up" in outcome.err
    same_tensors(tmp_path / "out", tmp_path / "expected")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    hub.repos[REPO] = Repo(path)
    quantize_from_hub(REPO, None, tmp_path / "streamed", INT4, INT8, Caller(print))
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_dry_run_counts_packed_weights(moecli: Command, hub: StandInHub, tmp_path: Path) -> None:
    path, _ = write(tmp_path / "packed", "gptq")
    hub.repos[REPO] = Repo(path)
    command = ("quantize", REPO, "--dense", "int8-g32", "-o", tmp_path / "out", "--dry-run")
    outcome = moecli(*command, "--rate", "1MB/s")
    assert "the source is GPTQ 4-bit: its errors and the new ones add up" in outcome.err
    seen = json.loads(moecli(*command, "--json").out)
    files = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    stored = sum(info.nbytes for info in Checkpoint.open(path).tensors.values())
    assert seen["source_form"] == "GPTQ 4-bit"
    assert seen["source_nbytes"] == stored
    assert seen["download_nbytes"] == sum(files.values())
    # Every file holds parts that others need: all lie there together at the end.
    assert seen["peak_disk_nbytes"] == seen["out_nbytes"] + sum(files.values())
    weights = sum(2 * tensor.numel() for tensor in tiny.qwen3_tensors().values())
    assert seen["quantizing_s"] == pytest.approx(weights / seen["quantize_rate"])
    quantize_from_hub(REPO, None, tmp_path / "out", INT4, INT8, Caller(print))
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written == seen["out_nbytes"]


def test_files_are_let_go_when_no_weight_needs_them_any_more(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts at the border of two files: the first stays until the second is used, no longer."""
    from moecli.hub.streaming import HubSupply

    config, tensors, _ = packed_model("gptq")
    tiny.write_checkpoint(tmp_path / "packed", config, tensors, shards=4)
    hub.repos[REPO] = Repo(tmp_path / "packed")
    seen: list[tuple[str, str]] = []
    for action in ("take", "release"):
        method = getattr(HubSupply, action)

        def watched(
            supply: HubSupply, name: str, action: str = action, method: Any = method
        ) -> None:
            seen.append((action, name[9:11]))
            method(supply, name)

        monkeypatch.setattr(HubSupply, action, watched)
    quantize_from_hub(REPO, None, tmp_path / "out", INT4, INT8, Caller(print))
    names = ("01", "02", "03", "04")
    assert [name for action, name in seen if action == "take"] == list(names)
    assert sorted(name for action, name in seen if action == "release") == list(names)
    released = {name: seen.index(("release", name)) for name in names}
    taken = {name: seen.index(("take", name)) for name in names}
    held = [name for name in names[:3] if released[name] > taken[f"{int(name) + 1:02}"]]
    assert held, "no weight lies across a border: nothing was tested"
    for name in names[:2]:
        assert released[name] < taken[f"{int(name) + 2:02}"]


def test_descriptions_of_weights_are_asked_for_alone(hub: StandInHub, tmp_path: Path) -> None:
    """Of bitsandbytes, before any file comes; and a hub that refuses them is told."""
    path, _ = write(tmp_path / "packed", "nf4")
    hub.repos[REPO] = Repo(path)
    quantize_from_hub(REPO, None, tmp_path / "out", INT4, INT8, Caller(print))
    sizes = {file.stat().st_size for file in path.glob("*.safetensors")}
    ranges = [asked.range or "" for asked in hub.bodies(".safetensors")]
    spans = [[int(end) for end in r.removeprefix("bytes=").split("-")] for r in ranges]
    whole = [span for span in spans if span[0] == 0 and span[1] + 1 in sizes]
    assert len(whole) == _FILES, "each file comes once"
    states = sum(".quant_state." in name for name in Checkpoint.open(path).tensors)
    assert states == 4 * 4 + 4 * 4 * 3
    assert len(spans) < _FILES * (64 // _FILES + 3) + states
