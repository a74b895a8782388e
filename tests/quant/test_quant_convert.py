"""The streaming conversion: what it writes, for every kind of source."""

import json
from pathlib import Path

import pytest
import torch
from quant_sources import (
    HIDDEN,
    INTERMEDIATE,
    expert_matrices,
    make_job,
    random_weights,
    tree_bytes,
    write_source,
)
from safetensors import safe_open

from quant.checkpoint import Checkpoint, QuantizedCheckpoint
from quant.convert import convert
from quant.job import ConversionProgress
from quant.layout import ExpertLayout
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_files", [1, 3])
def test_every_weight_arrives(
    tmp_path: Path, fused: bool, dtype: torch.dtype, num_files: int
) -> None:
    weights = random_weights(fused, dtype=dtype)
    source = write_source(tmp_path / "source", weights, num_files)
    result = convert(make_job(source, tmp_path / "out", fused))
    written = QuantizedCheckpoint.open(result.out)
    written.verify()
    assert written.layers == (0, 1)
    for layer in written.layers:
        assert written.num_experts(layer) == 4
        for expert in range(4):
            path, offset, nbytes = written.expert_span(layer, expert)
            assert offset % 4096 == 0
            blob = torch.frombuffer(
                bytearray(path.read_bytes()[offset : offset + nbytes]), dtype=torch.uint8
            )
            views = written.layout.views(blob)
            for kind, matrix in expert_matrices(weights, layer, expert).items():
                expected = quantize(matrix, written.scheme)
                assert torch.equal(getattr(views, kind).packed, expected.packed)
                assert torch.equal(getattr(views, kind).scale, expected.scale)
    for name, weight in weights.items():
        if ".experts." in name:
            continue
        found = written.dense(name)
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            assert isinstance(found, QuantizedWeight)
            assert torch.equal(dequantize(found), dequantize(quantize(weight, QuantScheme(8, 64))))
        else:
            kept = weight.bfloat16() if dtype == torch.float32 else weight
            assert isinstance(found, torch.Tensor)
            assert found.dtype == kept.dtype
            assert torch.equal(found, kept)


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_weights(True))
    job = make_job(source, tmp_path / "deep" / "out", True)
    convert(job)
    out = job.out
    names = {"config.json", "model.safetensors", "moecli.json", "tokenizer.json"}
    assert {file.name for file in out.iterdir()} == names
    assert json.loads((out / "config.json").read_text()) == job.config
    assert (out / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert not job.partial.exists()


@pytest.mark.parametrize("shard_nbytes", [1, 40_000, 200_000, 10**9])
def test_shards_hold_the_same_tensors(tmp_path: Path, shard_nbytes: int) -> None:
    weights = random_weights(False, num_experts=6)
    source = write_source(tmp_path / "source", weights)
    whole = convert(make_job(source, tmp_path / "whole", False)).out
    job = make_job(source, tmp_path / "out", False, shard_nbytes=shard_nbytes)
    convert(job)
    shards = sorted(job.out.glob("*.safetensors"))
    units = len(job.experts) + len(job.dense)
    assert len(shards) == {1: units, 40_000: 8, 200_000: 2, 10**9: 1}[shard_nbytes]
    if shard_nbytes > 1:
        assert all(shard.stat().st_size <= shard_nbytes + 8192 for shard in shards)
    written, expected = QuantizedCheckpoint.open(job.out), QuantizedCheckpoint.open(whole)
    written.verify()
    for name in expected.checkpoint.tensors:
        if not name.startswith("moecli.padding"):
            assert torch.equal(written.checkpoint.read(name), expected.checkpoint.read(name))
    spans = {written.expert_span(layer, e)[:2] for layer in (0, 1) for e in range(6)}
    assert len(spans) == 12


def test_the_safetensors_library_reads_every_tensor(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_weights(True))
    out = convert(make_job(source, tmp_path / "out", True)).out
    ours = Checkpoint.open(out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(ours.tensors)
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 no mapping
            assert torch.equal(file.get_tensor(name), ours.read(name))
            if name.endswith("weight_shape"):
                kind = name.split(".")[-2]
                if ".experts." in name:
                    layout = ExpertLayout(HIDDEN, INTERMEDIATE, QuantScheme())
                    assert file.get_tensor(name).tolist() == list(layout.projections[kind])


def test_experts_come_first_and_everything_is_aligned(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_weights(True, num_experts=3))
    out = convert(make_job(source, tmp_path / "out", True)).out
    tensors = sorted(Checkpoint.open(out).tensors.items(), key=lambda item: item[1].offset)
    kinds = ["expert" if ".experts." in n and "shape" not in n else "rest" for n, _ in tensors]
    last_expert = max(i for i, kind in enumerate(kinds) if kind == "expert")
    fillers = [n for n, _ in tensors[:last_expert] if "padding" in n]
    assert kinds[: last_expert + 1].count("rest") == len(fillers) == 5
    for name, info in tensors:
        assert info.offset % info.dtype.itemsize == 0, name
    names = [name for name, _ in tensors if "padding" in name]
    assert len(names) == len(set(names))


def test_experts_that_fill_pages_need_no_filler(tmp_path: Path) -> None:
    """As all real ones do: then the file holds the tensors of the format and nothing else."""
    weights = {
        "layers.0.router.weight": torch.zeros(2, 128, dtype=torch.bfloat16),
        "layers.0.experts.gate_up_proj": torch.randn(2, 128, 2 * 1024).bfloat16(),
        "layers.0.experts.down_proj": torch.randn(2, 1024, 128).bfloat16(),
    }
    from quant.items import ExpertItem, TensorSlice

    source = write_source(tmp_path / "source", weights)
    job = make_job(source, tmp_path / "out", True)
    experts = tuple(
        ExpertItem(
            0, e, f"layers.0.experts.{e}",
            TensorSlice("layers.0.experts.gate_up_proj", e, True, (0, 1024)),
            TensorSlice("layers.0.experts.gate_up_proj", e, True, (1024, 2048)),
            TensorSlice("layers.0.experts.down_proj", e, True),
        )
        for e in range(2)
    )  # fmt: skip
    out = convert(type(job)(**{**vars(job), "experts": experts})).out
    assert not [name for name in Checkpoint.open(out).tensors if "padding" in name]


def test_dense_layers_can_stay_in_16_bits(tmp_path: Path) -> None:
    weights = random_weights(True)
    source = write_source(tmp_path / "source", weights)
    written = QuantizedCheckpoint.open(
        convert(make_job(source, tmp_path / "out", True, dense_scheme=None)).out
    )
    assert written.dense_scheme is None
    found = written.dense("layers.0.q_proj.weight")
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, weights["layers.0.q_proj.weight"])


def test_progress_and_result(tmp_path: Path) -> None:
    weights = random_weights(True)
    source = write_source(tmp_path / "source", weights)
    seen: list[ConversionProgress] = []
    result = convert(make_job(source, tmp_path / "out", True), seen.append)
    total = sum(weight.nbytes for weight in weights.values())
    assert result.source_nbytes == seen[-1].done_nbytes == seen[0].total_nbytes == total
    assert [p.done_nbytes for p in seen] == sorted(p.done_nbytes for p in seen)
    assert len(seen) == 3 * 8 + 8
    assert {p.item for p in seen} >= {"layers.1.experts.3", "layers.0.q_proj", "norm.weight"}
    assert seen[-1].eta_s == 0
    assert all(p.eta_s is not None and p.eta_s > 0 for p in seen[:-1])
    assert result.out_nbytes == sum(f.stat().st_size for f in result.out.iterdir())
    assert result.bpw_experts == 4.5
    assert 4.5 < result.bpw < 7
    exact = total_error(weights)
    assert result.error_experts == pytest.approx(exact, rel=1e-4)
    assert seen[-1].error == result.error_experts
    assert 0.002 < result.error_dense < 0.01
    assert result.units_resumed == 0


def total_error(weights: dict[str, torch.Tensor]) -> float:
    error = total = 0.0
    for layer in range(2):
        for expert in range(4):
            for matrix in expert_matrices(weights, layer, expert).values():
                back = dequantize(quantize(matrix, QuantScheme()), torch.float64)
                error += float((back - matrix.double()).square().sum())
                total += float(matrix.double().square().sum())
    return (error / total) ** 0.5


def test_the_bytes_depend_on_source_and_job_alone(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", random_weights(True, num_experts=3))
    first = convert(make_job(source, tmp_path / "a", True)).out
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        second = convert(make_job(source, tmp_path / "b", True)).out
    finally:
        torch.set_num_threads(threads)
    assert tree_bytes(first) == tree_bytes(second)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    from quant.errors import QuantError

    source = write_source(tmp_path / "source", random_weights(True))
    out = convert(make_job(source, tmp_path / "out", True)).out
    for name in ("model.safetensors", "tokenizer.json"):
        file = out / name
        content = file.read_bytes()
        middle = len(content) - 3
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(QuantError, match=name):
            QuantizedCheckpoint.open(out).verify()
        file.write_bytes(content)
    done = []
    QuantizedCheckpoint.open(out).verify(lambda part, whole: done.append((part, whole)))
    assert done[-1][0] == done[-1][1] > 0


def test_tensors_of_odd_sizes_are_aligned(tmp_path: Path) -> None:
    weights = random_weights(True)
    weights["a.weight"] = torch.ones(3, dtype=torch.bfloat16)
    weights["b.ids"] = torch.arange(5)
    weights["c.mask"] = torch.ones(3, dtype=torch.uint8)
    weights["d.scalar"] = torch.tensor(2.5)
    weights["e.weight"] = torch.ones(5, 3, dtype=torch.bfloat16)
    source = write_source(tmp_path / "source", weights)
    job = make_job(source, tmp_path / "out", True)
    ordered = tuple(sorted(job.dense, key=lambda item: item.name))
    out = QuantizedCheckpoint.open(convert(type(job)(**{**vars(job), "dense": ordered})).out)
    for name, info in out.checkpoint.tensors.items():
        assert info.offset % info.dtype.itemsize == 0, name
    for name in ("a.weight", "b.ids", "c.mask", "e.weight"):
        found = out.dense(name)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, weights[name])
    scalar = out.dense("d.scalar")
    assert isinstance(scalar, torch.Tensor)
    assert scalar.dtype == torch.bfloat16
    assert scalar.item() == 2.5


def test_one_slice_is_held_and_let_go_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.items import SliceReader, TensorSlice

    weights = random_weights(True)
    reader = SliceReader(write_source(tmp_path / "source", weights))
    reads = []
    read_slice = Checkpoint.read_slice

    def watched(self: Checkpoint, name: str, index: int) -> torch.Tensor:
        assert reader._tensor is None, "two slices are in memory"
        reads.append((name, index))
        return read_slice(self, name, index)

    monkeypatch.setattr(Checkpoint, "read_slice", watched)
    name = "layers.0.experts.gate_up_proj"
    for index in (0, 1):
        for start in (0, INTERMEDIATE):
            part = TensorSlice(name, index, True, (start, start + INTERMEDIATE))
            rows = torch.cat(list(reader.blocks(part)))
            assert torch.equal(rows, weights[name][index].t()[start : start + INTERMEDIATE])
    assert reads == [(name, 0), (name, 1)]
