"""Directories: what is found in good ones, what is said about bad ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quant_sources import make_job, random_weights, write_source

from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.errors import QuantError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    source = write_source(path / "source", random_weights(True))
    return convert(make_job(source, path / "out", True)).out


@pytest.mark.parametrize("num_files", [1, 3])
def test_tensors_are_found_in_all_files(tmp_path: Path, num_files: int) -> None:
    weights = random_weights(False)
    source = write_source(tmp_path / "source", weights, num_files)
    assert set(source.tensors) == set(weights)
    assert len(source.files) == num_files
    assert source.config == {"model_type": "test"}
    for name, weight in weights.items():
        assert torch.equal(source.read(name), weight)
        info = source.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (
            weight.dtype, tuple(weight.shape), weight.nbytes,
        )  # fmt: skip
    assert torch.equal(source.read_slice("embed.weight", 3), weights["embed.weight"][3])


def test_a_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    weights = random_weights(False)
    first = write_source(tmp_path / "a", weights).fingerprint
    assert write_source(tmp_path / "b", weights).fingerprint == first
    tuned = weights | {"embed.weight": weights["embed.weight"] + 1}
    assert write_source(tmp_path / "c", tuned).fingerprint != first
    (tmp_path / "b" / "config.json").write_text('{"model_type": "other"}')
    assert Checkpoint.open(tmp_path / "b").fingerprint != first


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantError, match="not a directory"):
        Checkpoint.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no `config\.json`"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_config_that_is_missing_or_wrong(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = write_source(tmp_path / "source", random_weights(False)).path
    (path / "config.json").unlink()
    if content is not None:
        (path / "config.json").write_bytes(content)
    with pytest.raises(QuantError, match=message) as caught:
        Checkpoint.open(path)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(QuantError, match=f"only pickled weights .`{name}`") as caught:
        Checkpoint.open(tmp_path)
    assert "safetensors" in (caught.value.hint or "")


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(QuantError, match="neither"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", random_weights(False), 3).path
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(QuantError, match=r"lacks 1 of 3 shards: `model-00002"):
        Checkpoint.open(path)


def test_a_truncated_shard(tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", random_weights(False), 3).path
    shard = path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(QuantError, match=str(shard)):
        Checkpoint.open(path)


@pytest.mark.parametrize("file_name", ["../secret.safetensors", "/etc/passwd", "", 7, ".."])
def test_an_index_that_leads_elsewhere(tmp_path: Path, file_name: object) -> None:
    path = write_source(tmp_path / "source", random_weights(False), 2).path
    index = {"weight_map": {"x": file_name}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QuantError):
        Checkpoint.open(path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", random_weights(False), 2).path
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(QuantError, match=r"lacks `ghost\.weight`"):
        Checkpoint.open(path)
    index_file.write_text('{"weight_map": []}')
    with pytest.raises(QuantError, match="no weight_map"):
        Checkpoint.open(path)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_weights(False))
    with pytest.raises(QuantError, match=r"no tensor `ghost\.weight`"):
        source.read("ghost.weight")


def test_a_source_is_not_taken_for_a_result(tmp_path: Path) -> None:
    path = write_source(tmp_path / "source", random_weights(False)).path
    with pytest.raises(QuantError, match="not written by moecli") as caught:
        QuantizedCheckpoint.open(path)
    assert "moecli quantize" in (caught.value.hint or "")
    with pytest.raises(QuantError):
        QuantizedCheckpoint.open(tmp_path / "nowhere")


def test_a_result_of_another_version(written: Path, tmp_path: Path) -> None:
    path = shutil.copytree(written, tmp_path / "copy")
    manifest = json.loads((path / "moecli.json").read_text())
    (path / "moecli.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(QuantError, match="format 99"):
        QuantizedCheckpoint.open(path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_incomplete_copy_of_a_result(written: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(written, tmp_path / "copy")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    with pytest.raises(QuantError, match=name):
        QuantizedCheckpoint.open(path)
    (path / name).unlink()
    with pytest.raises(QuantError, match=name):
        QuantizedCheckpoint.open(path)


@pytest.mark.parametrize("key", ["scheme", "files", "experts", "hidden_size", "shards"])
@pytest.mark.parametrize("value", [None, "nonsense", -1, {"x": 1}])
def test_a_manifest_that_was_edited(written: Path, tmp_path: Path, key: str, value: object) -> None:
    path = shutil.copytree(written, tmp_path / "copy")
    manifest = json.loads((path / "moecli.json").read_text())
    manifest[key] = value
    if value is None:
        del manifest[key]
    (path / "moecli.json").write_text(json.dumps(manifest))
    with pytest.raises(QuantError):
        QuantizedCheckpoint.open(path)


def test_where_experts_lie(written: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(written)
    assert checkpoint.scheme.name == "int4-g32"
    assert checkpoint.layers == (0, 1)
    spans = [checkpoint.expert_span(layer, e) for layer in (0, 1) for e in range(4)]
    assert len(set(spans)) == 8
    for number, (path, offset, nbytes) in enumerate(spans):
        assert path == written / "model.safetensors"
        assert nbytes == checkpoint.layout.nbytes
        tensor = f"layers.{number // 4}.experts.{number % 4}.gate_proj.weight_packed"
        assert checkpoint.checkpoint.tensors[tensor].offset == offset
