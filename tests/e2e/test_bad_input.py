"""Bad input of every kind: exit 1, a message that names it, a hint, no traceback, nothing lost."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import Command, Outcome
from tests.e2e import tiny

SHARD = "model.safetensors"


def assert_refused(outcome: Outcome, *words: str) -> None:
    """A user's error: exit 1, nothing on stdout, the words on stderr, a hint, no traceback."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "internal error" not in outcome.err
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1
    assert "\nhint: " in outcome.err
    for word in words:
        assert word in outcome.err


def quantize(moecli: Command, source: Path, out: Path) -> Outcome:
    return moecli("quantize", source, "-o", out, "--dense", "int8-g32")


def damage_header(source: Path, change: Callable[[dict], object]) -> None:
    raw = (source / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (source / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def change_config(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


def change_tensor(source: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(source / SHARD) | {name: tensor}, source / SHARD)


def test_no_config(moecli: Command, source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert_refused(quantize(moecli, source, tmp_path / "out"), "config.json")


def test_config_is_not_json(moecli: Command, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    assert_refused(quantize(moecli, source, tmp_path / "out"), "config.json")


def test_dense_model(moecli: Command, source: Path, tmp_path: Path) -> None:
    change_config(source, model_type="llama", architectures=["LlamaForCausalLM"])
    assert_refused(quantize(moecli, source, tmp_path / "out"), "LlamaForCausalLM")


def test_unknown_architecture_is_named_beside_what_is_supported(
    moecli: Command, source: Path, tmp_path: Path
) -> None:
    change_config(source, model_type="zorp_moe", architectures=["ZorpMoeForCausalLM"])
    outcome = quantize(moecli, source, tmp_path / "out")
    assert_refused(outcome, "zorp_moe", "llama4", "qwen3_moe")


def test_truncated_shard(moecli: Command, source: Path, tmp_path: Path) -> None:
    raw = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(raw[:-100])
    assert_refused(quantize(moecli, source, tmp_path / "out"), SHARD)


@pytest.mark.parametrize("raw", [b"", b"1234", b"\xff" * 64, struct.pack("<Q", 1 << 60) + b"{}"])
def test_file_that_is_no_safetensors(
    moecli: Command, source: Path, tmp_path: Path, raw: bytes
) -> None:
    (source / SHARD).write_bytes(raw)
    assert_refused(quantize(moecli, source, tmp_path / "out"), SHARD)


@pytest.mark.parametrize("offsets", [[0, 64], [-8, 0], [1 << 62, (1 << 62) + 64], [64, 0]], ids=str)
def test_absurd_offsets(moecli: Command, source: Path, tmp_path: Path, offsets: list[int]) -> None:
    damage_header(source, lambda h: h["lm_head.weight"].update(data_offsets=offsets))
    assert_refused(quantize(moecli, source, tmp_path / "out"), SHARD)


def test_absurd_shape(moecli: Command, source: Path, tmp_path: Path) -> None:
    damage_header(source, lambda h: h["lm_head.weight"].update(shape=[1 << 40, 1 << 40]))
    assert_refused(quantize(moecli, source, tmp_path / "out"), "lm_head.weight")


def test_missing_shard(moecli: Command, source: Path, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(tiny.llama4_tensors(), "model-00002-of-00002.safetensors")}
    (source / SHARD).unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = quantize(moecli, source, tmp_path / "out")
    assert_refused(outcome, "model-00002-of-00002.safetensors")


def test_missing_tensor(moecli: Command, source: Path, tmp_path: Path) -> None:
    name = "model.layers.2.feed_forward.experts.down_proj"
    tensors = load_file(source / SHARD)
    del tensors[name]
    save_file(tensors, source / SHARD)
    assert_refused(quantize(moecli, source, tmp_path / "out"), name)


def test_wrong_shape(moecli: Command, source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    change_tensor(source, name, torch.zeros(tiny.EXPERTS, tiny.HIDDEN, 10).bfloat16())
    assert_refused(quantize(moecli, source, tmp_path / "out"), name, "10")


def test_pickles_only(moecli: Command, source: Path, tmp_path: Path) -> None:
    (source / SHARD).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    outcome = quantize(moecli, source, tmp_path / "out")
    assert_refused(outcome, "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.3.feed_forward.experts.gate_up_proj", "model.norm.weight"]
)
def test_not_finite_weights(
    moecli: Command, source: Path, tmp_path: Path, name: str, bad: float
) -> None:
    tensor = tiny.llama4_tensors()[name]
    tensor.view(-1)[-1] = bad
    change_tensor(source, name, tensor)
    assert_refused(quantize(moecli, source, tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_group_size_that_does_not_divide(moecli: Command, source: Path, tmp_path: Path) -> None:
    outcome = moecli("quantize", source, "--group-size", "128", "-o", tmp_path / "out")
    assert_refused(outcome, "128", "--group-size")


def test_group_size_that_does_not_exist(moecli: Command, source: Path, tmp_path: Path) -> None:
    outcome = moecli("quantize", source, "--group-size", "48", "-o", tmp_path / "out")
    assert_refused(outcome, "48", "--group-size")


def test_output_that_exists_is_left_alone(moecli: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    assert_refused(moecli("quantize", source, "-o", out), str(out))
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_output_below_a_file(moecli: Command, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(quantize(moecli, source, tmp_path / "file" / "out"), "out")


def test_source_is_not_there(moecli: Command, tmp_path: Path) -> None:
    assert_refused(moecli("quantize", tmp_path / "nothing", "-o", tmp_path / "out"), "nothing")


def test_model_is_not_quantized(moecli: Command, source: Path) -> None:
    assert_refused(moecli("run", source, "hi"), str(source), "moecli quantize")


def test_budget_too_small_says_what_is_needed(moecli: Command, quantized: Path) -> None:
    assert_refused(moecli("run", quantized, "hi", "--ram", "10KiB"), "10KiB", "needs", "--ram")


def test_context_longer_than_the_models(moecli: Command, quantized: Path) -> None:
    assert_refused(moecli("run", quantized, "hi", "--ctx", "4k"), "4096", "512")


def test_prompt_longer_than_the_context(moecli: Command, quantized: Path) -> None:
    assert_refused(moecli("run", quantized, "x" * 400, "--ctx", "100"), "100", "--ctx")


@pytest.mark.parametrize("prompt", ["", "   \n"])
def test_empty_prompt(moecli: Command, quantized: Path, prompt: str) -> None:
    assert_refused(moecli("run", quantized, prompt), "empty")


def test_invalid_utf8_on_stdin(moecli: Command, quantized: Path) -> None:
    assert_refused(moecli("run", quantized, stdin=b"caf\xe9 au lait"), "UTF-8", "3")


@pytest.mark.parametrize(
    "raw", [b"not json", b"[]", b'{"version": 1}', b"\xff\xfe", b'{"messages": 3}']
)
def test_chat_file_that_is_not_one(
    moecli: Command, quantized: Path, tmp_path: Path, raw: bytes
) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(raw)
    outcome = moecli("chat", quantized, stdin=f"/load {path}\n/exit\n".encode())
    assert outcome.code == 0
    assert str(path) in outcome.out + outcome.err
    assert "Traceback" not in outcome.err
