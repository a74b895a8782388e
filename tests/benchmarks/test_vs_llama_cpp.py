"""The comparison with llama.cpp in tiny sizes, with a stand-in for it: speeds prove nothing."""

import json
import math
import os
import sys
from inspect import signature
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import vs_llama_cpp
from benchmarks.llama import compare, our_model
from benchmarks.llama.compare import MATCHES, correlation
from benchmarks.llama.naming import Named, tensors
from benchmarks.llama.numbers import Numbers, turned
from benchmarks.llama.our_worker import Ours
from benchmarks.llama.report import Spread, summarize, tables
from benchmarks.llama.shapes import SHAPES, TINY, Shape
from benchmarks.llama.workers import Worker
from moecli.commands.quantize import quantize as quantize_command
from moecli.config import EngineConfig
from moecli.engine import Engine
from moecli.models.config import ModelSpec
from quant.checkpoint import QuantizedCheckpoint
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

INT8 = QuantScheme(8, 32)


@pytest.fixture(scope="module", params=TINY, ids=lambda shape: shape.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tiny shape, and the model that was made of it."""
    shape: Shape = request.param
    path = tmp_path_factory.mktemp(shape.name) / "model"
    our_model.make(shape.config, path, INT8, INT8)
    return shape, path


# The same model on both sides


@pytest.mark.parametrize("shape", SHAPES + TINY, ids=lambda shape: shape.name)
def test_every_weight_of_the_model_has_one_name_on_either_side(shape: Shape) -> None:
    named = list(tensors(shape.config))
    assert len({tensor.hf for tensor in named}) == len(named)
    stacks = [(name, list(same)) for name, same in groupby(named, lambda tensor: tensor.gguf)]
    assert len({name for name, _ in stacks}) == len(stacks), "experts of a tensor stand apart"
    for _, parts in stacks:
        assert [part.expert for part in parts] in ([None], list(range(len(parts))))
    spec = ModelSpec.from_hf(shape.config)
    assert sum(math.prod(tensor.shape) for tensor in named) == spec.num_text_params


def test_what_is_stored_are_the_numbers_of_these_names(made) -> None:
    shape, path = made
    numbers, checkpoint = Numbers(), QuantizedCheckpoint.open(path)
    for tensor in tensors(shape.config):
        if tensor.expert not in (None, 1):
            continue
        stem, expected = tensor.hf.removesuffix(".weight"), torch.tensor(numbers.fp32(tensor))
        if f"{stem}.weight_packed" in checkpoint.checkpoint.tensors:
            parts = (f"{stem}.weight_packed", f"{stem}.weight_scale")
            weight = QuantizedWeight(*map(checkpoint.checkpoint.read, parts), INT8)
            found = dequantize(weight)
            assert (found - expected).norm() < 0.01 * expected.norm(), tensor.hf
        else:
            assert torch.equal(checkpoint.checkpoint.read(tensor.hf).float(), expected)


def test_numbers_are_bf16_of_the_wanted_size_and_depend_on_the_name() -> None:
    numbers = Numbers()
    one, other = (Named(f"model.layers.{i}.x", f"blk.{i}.x", (64, 400)) for i in (0, 1))
    found = torch.tensor(numbers.fp32(one))
    assert torch.equal(found, found.bfloat16().float())
    assert found.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert not np.array_equal(numbers.bf16(one), numbers.bf16(other))
    assert np.array_equal(numbers.bf16(one), Numbers().bf16(one))
    embedding = Named("model.embed_tokens.weight", "token_embd.weight", (64, 400))
    assert numbers.fp32(embedding).std() == pytest.approx(1, rel=0.05)
    assert set(numbers.fp32(Named("norm", "norm", (7,)))) == {1.0}
    wide = Named("wide", "wide", (3, 8_000_000))  # more than there are numbers
    assert numbers.bf16(wide).shape == wide.shape


def test_routers_ask_for_all_experts(made) -> None:
    _, path = made
    ours = Ours()
    ours.open(str(path), threads=torch.get_num_threads(), ctx=512, kernels="auto")
    try:
        found = ours.routing(400)
        assert found["least"] > 0.2
        assert found["median"] == pytest.approx(1, rel=0.5)
        assert found["most"] < 3
        assert ours.routing(400) != found, "the same prompt twice"
    finally:
        ours.close()


def test_sizes_leave_out_the_input_embedding(made) -> None:
    shape, path = made
    found = our_model.sizes(path)
    spec = ModelSpec.from_hf(shape.config)
    with Engine.open(path, EngineConfig(ctx=32, device="cpu")) as engine:
        assert found.read_nbytes == engine.plan.ram_nbytes_per_token
        assert (
            found.nbytes
            == engine.plan.dense_nbytes
            + spec.num_experts * len(spec.moe_layers) * engine.plan.expert_nbytes
        )
    assert 8.5 < found.bits_a_weight < 8.7


def test_gguf_has_the_same_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.llama.gguf_model import write_gguf

    shape = TINY[0]
    write_gguf(shape.arch, shape.config, tmp_path / "a.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert set(stored) == {tensor.gguf for tensor in tensors(shape.config)}


def test_heads_of_llama_have_rows_that_turn_together_side_by_side() -> None:
    rows = np.arange(8).reshape(8, 1)  # two heads of four: 0 turns with 2, 1 with 3
    assert turned(rows, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    mixtral = [tensor for tensor in tensors(SHAPES[2].config) if tensor.turned_heads is not None]
    assert {(tensor.gguf.split(".")[2], tensor.turned_heads) for tensor in mixtral} == {
        ("attn_q", 32),
        ("attn_k", 8),
    }


def test_the_default_kind_is_what_quantize_writes_unless_told_otherwise() -> None:
    (kind,) = (match.ours for match in MATCHES if match.ours.name == "default")
    said = signature(quantize_command).parameters
    usual = said["scheme_name"].default, said["dense_name"].default
    assert (kind.scheme, kind.dense_scheme) == usual


# Workers


STAND_IN = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.llama.serving import serve
SIZES = {{"nbytes": 1000, "read_nbytes": 500.0, "bits_a_weight": 4.5, "nbytes_by_type": {{}}}}
def touch(path): Path(path).write_bytes(b"GGUF")
serve({{
    "version": lambda: {{"llama_cpp_python": "none"}},
    "write": lambda arch, config, path: touch(path),
    "quantize": lambda source, out, kind, pure, threads: touch(out),
    "sizes": lambda path, experts_used: SIZES,
    "open": lambda path, repack, threads, ctx: None,
    "prefill": lambda tokens: 1000.0,
    "decode": lambda tokens: 100.0,
    "logits": lambda tokens: [float(i) for i in range(512)],
    "fail": lambda: 1 / 0,
    "die": lambda: os._exit(3),
    "burn": lambda: [0 for _ in iter(lambda: time.process_time() < {seconds}, False)] and 1,
}})
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A "Python" that takes any arguments and plays llama.cpp's worker."""
    script, python = tmp_path / "stand_in.py", tmp_path / "python"
    root = str(Path(vs_llama_cpp.__file__).parents[1])
    script.write_text(STAND_IN.format(root=root, seconds=0.4))
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    python.chmod(0o755)
    return str(python)


def test_the_whole_script_in_tiny_sizes(tmp_path: Path, stand_in: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "measure_ram", lambda threads, nbytes: 20e9)
    monkeypatch.setattr(compare, "_READ_NBYTES", 1 << 20)
    monkeypatch.setattr(compare, "_TURNS", 3)
    work, path = tmp_path / "work", tmp_path / "report.json"
    path.write_text('{"shapes": [{"name": "earlier"}]}')
    flags = ["--add", "--tiny", "--threads", "1", "--alternations", "2", "--pp", "12", "--tg", "3"]
    flags += ["--sequences", "1", "2", "--shapes", "tiny-qwen3", "--kinds", "int4"]
    vs_llama_cpp.main([*flags, "--peer-python", stand_in, "--work", str(work), "--json", str(path)])
    report = json.loads(path.read_text())
    kept, shape = report["shapes"]
    assert kept == {"name": "earlier"}
    assert shape["run"]["peer"] == {"llama_cpp_python": "none"}
    (comparison,) = shape["comparisons"]
    assert comparison["ours"] == "int4"
    assert [peer["peer"] for peer in comparison["peers"]] == [k.name for k in MATCHES[0].theirs]
    for peer in comparison["peers"]:
        assert len(peer["alternations"]) == 2
        assert peer["alternations"][0]["theirs_decode"] == 100.0
        assert peer["alternations"][0]["ours_decode"] > 0
        assert abs(peer["correlation_of_logits"]) < 0.5, "the stand-in computes no model"
    assert {count: len(r) for count, r in comparison["together"].items()} == {"1": 2, "2": 2}
    assert {what: len(r) for what, r in comparison["beside_memory"].items()} == {
        "ram_bw": 4,
        "decode": 3,
    }
    assert comparison["summary"]["marks"]
    assert not (work / "tiny-qwen3").exists(), "models were left behind"
    table = capsys.readouterr().out
    assert "| tiny-qwen3 | int4" in table
    assert "Q4_K_M, as stored" in table


def test_models_are_kept_and_used_again(tmp_path: Path, stand_in: str, capsys) -> None:
    work = tmp_path / "work"
    flags = ["--tiny", "--threads", "1", "--shapes", "tiny-scout", "--make-only"]
    command = [*flags, "--peer-python", stand_in, "--work", str(work), "--kinds"]
    vs_llama_cpp.main([*command, "int8"])
    made = {file: file.stat().st_mtime_ns for file in (work / "tiny-scout").rglob("*")}
    assert {"Q8_0.gguf", "moecli-int8"} == {file.name for file in (work / "tiny-scout").iterdir()}
    vs_llama_cpp.main([*command, "int8", "int4"])
    now = {file: file.stat().st_mtime_ns for file in (work / "tiny-scout").rglob("*")}
    assert now.items() > made.items()
    assert work / "tiny-scout" / "moecli-int4" in now


def test_a_worker_that_fails_or_dies_is_told_of(tmp_path: Path, stand_in: str) -> None:
    log = tmp_path / "log"
    with Worker(stand_in, "any", log) as worker:
        with pytest.raises(RuntimeError, match=r"`fail`: ZeroDivisionError.*log"):
            worker.ask("fail")
        assert worker.ask("decode", tokens=3) == 100.0
        with pytest.raises(RuntimeError, match=r"`die`: it has died"):
            worker.ask("die")
    assert "ZeroDivisionError" in log.read_text()


def test_what_a_worker_burns_itself_is_nobody_elses(tmp_path: Path, stand_in: str) -> None:
    with Worker(stand_in, "any", tmp_path / "log") as worker:
        before = worker.cpu_seconds()
        answer = worker.timed("burn")
        assert worker.cpu_seconds() - before > 0.2
    assert 0 <= answer.foreign_cores < 2 * (os.cpu_count() or 1)


def test_unknown_shapes_and_no_peer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MOECLI_PEER_PYTHON", raising=False)
    with pytest.raises(SystemExit, match="--peer-python PATH"):
        vs_llama_cpp.main(["--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="no shape is called `gpt`"):
        vs_llama_cpp.main(["--work", str(tmp_path), "--peer-python", "x", "--shapes", "gpt"])


# Arithmetic


def alternation(ram: float, ours: float, theirs: float, prefill: float = 600.0) -> dict:
    found = {"ram_bw": ram, "ours_decode": ours, "theirs_decode": theirs}
    found |= {"ours_prefill": prefill, "theirs_prefill": 500.0}
    for side in ("ours", "theirs"):
        found |= {f"{side}_{test}_foreign_cores": 0.1 for test in ("decode", "prefill")}
    return found


def comparison(ours: str = "int4") -> dict:
    peers = {
        "slow": [alternation(30e9, 110, 50), alternation(20e9, 90, 60), alternation(40e9, 120, 80)],
        "fast": [alternation(30e9, 110, 100), alternation(20e9, 90, 75, 700)],
    }
    return {
        "ours": ours,
        "sizes": {"read_nbytes": 0.25e9, "bits_a_weight": 4.5},
        "peers": [
            {
                "peer": name,
                "alternations": rounds,
                "sizes": {"read_nbytes": 0.3e9, "bits_a_weight": 5.0},
            }
            for name, rounds in peers.items()
        ],
        "together": {"1": [10.0, 30.0, 20.0], "4": [15.0, 19.0, 16.0]},
        "beside_memory": {"ram_bw": [20e9, 40e9, 30e9, 20e9], "decode": [108.0, 133.0, 40.0]},
    }


def test_ratios_are_taken_within_an_alternation_and_marks_against_the_best_peer() -> None:
    summary = summarize(comparison())
    slow = summary["peers"]["slow"]
    assert slow["decode"]["ratio"] == Spread(1.5, 1.5, 2.2)
    assert slow["decode"]["ours"] == Spread(110, 90, 120)
    assert slow["ours_share_of_ram_bw"].least == pytest.approx(120 * 0.25e9 / 40e9)
    assert slow["theirs_share_of_ram_bw"].most == pytest.approx(60 * 0.3e9 / 20e9)
    marks = {mark["what"]: mark for mark in summary["marks"]}
    decode = marks["decode against fast"]
    assert (decode["wanted"], decode["ok"]) == (1.1, True)
    assert decode["reached"] == pytest.approx((1.1 + 1.2) / 2)
    assert marks["prefill against slow"]["reached"] == 1.2
    together = marks["slowest count of sequences against one"]
    assert (together["reached"], together["ok"]) == (0.8, False)
    assert summary["share"].least == pytest.approx(40 * 0.25e9 / 25e9)
    assert marks["share of memory bandwidth"]["reached"] == pytest.approx(108 * 0.25e9 / 30e9)


def test_int8_has_marks_of_its_own() -> None:
    marks = {mark["what"]: mark for mark in summarize(comparison("int8"))["marks"]}
    assert marks["decode against fast"]["wanted"] == 1.2
    assert not marks["decode against fast"]["ok"]
    assert "share of memory bandwidth" not in marks


def test_tables() -> None:
    text = tables([{"name": "scout", "comparisons": [comparison()]}])
    row = next(line for line in text.splitlines() if "| fast" in line)
    assert "| int4, 4.50 bits, 250 MB a token | fast, 5.00 bits, 300 MB a token |" in row
    assert "| 100.0 : 87.5 | 1.15 (1.10 - 1.20) |" in row
    assert "1: 20.0, 4: 16.0" in text
    assert "| 1.00 | 0.80, missed |" in text


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
