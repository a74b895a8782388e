"""Benchmarks of real tiny models: what is counted and what holds of it; speeds prove nothing."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecli import bench_machine, benchmarking
from moecli.bench_result import BenchResult, BenchRow, Run
from moecli.bench_tests import BenchConfig, BenchTests
from moecli.benchmarking import Subject, drop_page_cache, run_bench
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.models.batch import Batch
from offload.hardware import Machine, peak_rss_nbytes
from quant.checkpoint import QuantizedCheckpoint
from tests.commands import Command

SMALL = BenchConfig(prompt_tokens=20, new_tokens=6, repeats=2, cold=1, sequences=(1, 3))
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidths are made up, and none is kept."""
    monkeypatch.setattr(bench_machine, "ram_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(
        benchmarking, "with_compute", lambda machine, *_: replace(machine, host_bw=5e9)
    )


def bench(
    path: Path,
    config: BenchConfig = SMALL,
    engine: EngineConfig | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchResult:
    engine = engine or EngineConfig(ctx=64, device="cpu")
    subject = Subject(path, engine, lambda: Engine.open(path, engine), lambda _: GREEDY)
    return run_bench(subject, config, cancelled, progress)


def test_every_test_from_cold_and_from_warm_experts(quantized_qwen3: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = bench(quantized_qwen3, progress=lambda *counts: seen.append(counts))
    found = [(row.test, row.slots, len(row.runs)) for row in result.rows]
    assert found == [
        *(("pp20", "cold", 1), ("tg6", "cold", 1)),
        *(("pp20", "warm", 2), ("tg6", "warm", 2), ("tg6 x1", "warm", 2), ("tg6 x3", "warm", 2)),
    ]
    assert seen == [(done, SMALL.num_runs) for done in range(1, SMALL.num_runs + 1)]
    rows = {(row.test, row.slots): row for row in result.rows}
    assert rows["pp20", "cold"].median("moved_nbytes") > 0
    for row in rows.values():
        assert row.tok_s > 0
        assert (row.median("ttft_s") is not None) == (row.test == "pp20")
        if row.slots == "warm" and row.test != "pp20":
            assert row.median("moved_nbytes") == 0
            assert row.median("hit_rate") == 1.0
            assert row.roofline_share is not None
    json.dumps(result.to_dict())


def test_a_token_reads_all_dense_weights_and_its_experts(quantized_qwen3: Path) -> None:
    """By the sizes of the stored tensors; several sequences share what they read."""
    result = bench(quantized_qwen3)
    checkpoint = QuantizedCheckpoint.open(quantized_qwen3)
    unread = ("embed_tokens.weight", "weight_shape", "inv_freq")
    dense = sum(
        info.nbytes
        for name, info in checkpoint.checkpoint.tensors.items()
        if not name.endswith(unread) and ".experts." not in name
    )
    expert, layers = checkpoint.layout.nbytes, len(checkpoint.layers)
    warm = {row.test: row.median("read_nbytes") for row in result.rows if row.slots == "warm"}
    assert warm["tg6"] == warm["tg6 x1"] == dense + 2 * layers * expert
    shared = warm["tg6 x3"] - dense / 3
    assert 2 * layers * expert / 3 <= shared <= 4 * layers * expert / 3


def test_what_is_predicted_stands_on_the_plan_that_was_executed(quantized: Path) -> None:
    with Engine.open(quantized, EngineConfig(ctx=64, device="cpu")) as engine:
        full = engine.plan
    budget = full.ram_nbytes - full.host_arena_nbytes // 2
    config = EngineConfig(ctx=64, device="cpu", ram_nbytes=budget)
    result = bench(quantized, BenchConfig(8, 4, repeats=1, cold=0), config)
    assert result.plan.host_slots == full.host_slots // 2
    assert result.plan.bottleneck in ("cpu", "disk")
    assert result.plan.predicted_tok_s is not None
    assert result.ram_bw == 20e9
    assert result.disk_bw is not None
    assert result.page_cache_dropped is False


def test_answers_go_on_past_the_end_that_the_model_sees(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every token an end, an answer still has its length; so has the cache of counts."""
    original = Engine.open

    def ending(path: Path, config: EngineConfig) -> Engine:
        engine = original(path, config)
        engine.tokenizer.eos_ids = frozenset(range(engine.spec.vocab_size))
        return engine

    monkeypatch.setattr(Engine, "open", ending)
    result = bench(quantized, BenchConfig(4, 5, repeats=1, cold=0))
    assert [row.test for row in result.rows] == ["pp4", "tg5"]


def test_several_sequences_in_one_step_are_those_sequences(quantized_qwen3: Path) -> None:
    """Of different lengths, and as each would be alone."""
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    config = EngineConfig(ctx=32, device="cpu", kernels="torch")  # which round no activations
    with Engine.open(quantized_qwen3, config) as engine:
        alone = []
        for prompt in prompts:
            cache = engine.new_session().cache
            engine.decoder.forward(Batch.of(torch.tensor(prompt), cache))
            alone.append(engine.decoder.forward(Batch.of(torch.tensor([3]), cache))[0])
        sessions = [engine.new_session() for _ in prompts]
        engine.step(sessions, prompts)
        found = engine.step(sessions, [[3]] * 3)
        assert [session.tokens for session in sessions] == [[*p, 3] for p in prompts]
    # Keys that differ by a rounding of fp32 may be two neighbours in the bf16 of the cache.
    torch.testing.assert_close(found, torch.stack(alone), atol=2e-3, rtol=0)
    assert (found[0] - alone[1]).abs().max() > 0.1


@pytest.mark.parametrize("after", [0, 1, 3, 9, 20])
def test_ctrl_c_ends_it_between_tokens_and_runs(quantized: Path, after: int) -> None:
    asked = iter(range(1000))
    closed: list[bool] = []
    original = Engine.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda engine: (closed.append(True), original(engine)))
        with pytest.raises(KeyboardInterrupt):
            bench(quantized, cancelled=lambda: next(asked) >= after)
    assert closed, "an engine was left open"


def test_a_context_too_short_for_the_tests_is_told(quantized: Path) -> None:
    for config in (BenchConfig(64, 4, cold=0), BenchConfig(8, 63, cold=0)):
        with pytest.raises(MoecliError, match="65 tokens; this one holds 64") as caught:
            bench(quantized, config)
        assert "--ctx 65" in str(caught.value.hint)
    bench(quantized, BenchConfig(63, 62, repeats=1, cold=0))


def test_on_a_device_there_is_one_sequence(quantized: Path) -> None:
    config = EngineConfig(ctx=64, device="simulated", vram_nbytes=1 << 30)
    with pytest.raises(MoecliError, match="one KV cache"):
        bench(quantized, SMALL, config)
    result = bench(quantized, BenchConfig(8, 4, repeats=1, cold=0, sequences=(1,)), config)
    assert result.plan.on_device
    answer = next(row for row in result.rows if row.test == "tg4")
    assert answer.median("read_nbytes") > result.plan.dense_nbytes


def test_each_repeat_has_other_tokens_and_the_same_length(quantized: Path) -> None:
    prompts: list[list[int]] = []
    with Engine.open(quantized, EngineConfig(ctx=64, device="cpu")) as engine:
        generate = engine.generate

        def noting(session, token_ids, sampling, cancelled):
            prompts.append(token_ids)
            return generate(session, token_ids, sampling, cancelled)

        engine.generate = noting  # type: ignore[method-assign]
        tests = BenchTests(engine, BenchConfig(12, 2), GREEDY, Machine, lambda: False)
        for _ in range(2):
            tests.prompt()
    assert [len(prompt) for prompt in prompts] == [12, 12]
    assert prompts[0] != prompts[1]


def test_files_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: asked.append(advice[3]))
    assert drop_page_cache(tmp_path)
    assert asked == [os.POSIX_FADV_DONTNEED]
    monkeypatch.delattr(os, "posix_fadvise")
    assert not drop_page_cache(tmp_path)


def test_memory_is_measured_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read for it must not count as memory that the model takes."""
    monkeypatch.undo()
    before = peak_rss_nbytes()
    found = bench_machine.ram_bandwidth(1)
    assert found is None or found > 1e8
    assert peak_rss_nbytes() - before < 100 << 20


def test_medians_and_spreads_of_a_row() -> None:
    runs = tuple(
        Run(rate, None, 0.0, allowed_tok_s=allowed)
        for rate, allowed in ((10.0, 20.0), (30.0, 40.0), (20.0, None))
    )
    row = BenchRow("tg4", "warm", runs)
    assert (row.tok_s, row.spread) == (20.0, (10.0, 30.0))
    assert row.roofline_share == pytest.approx((0.5 + 0.75) / 2)
    assert (row.median("hit_rate"), row.median("moved_nbytes")) == (None, 0.0)
    assert row.to_dict()["tok_s_most"] == 30.0


def test_the_command_on_the_embedded_model(moecli: Command, quantized_demo: Path) -> None:
    flags = ("--pp", "8", "--tg", "4", "--repeats", "1", "--ctx", "64", "--device", "cpu")
    outcome = moecli("bench", quantized_demo, *flags, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    content = json.loads(outcome.out)
    assert [row["test"] for row in content["rows"]] == ["pp8", "tg4", "pp8", "tg4"]
    assert content["plan"]["predicted_tok_s"] > 0
    assert content["peak_rss_nbytes"] > 0
    assert content["kernels"].split()[0] in ("cpu", "torch")
    assert (
        json.loads(moecli("bench", quantized_demo, *flags, "--json", "--kernels", "reference").out)[
            "kernels"
        ]
        == "reference"
    )


def test_random_tokens_are_not_kept_as_the_usage_of_experts(
    moecli: Command, quantized_demo: Path, home: Path
) -> None:
    name = quantized_demo.parent.name
    stored = home / ".local/share/moecli/models" / name
    stored.parent.mkdir(parents=True)
    stored.symlink_to(quantized_demo)
    run = ("--ctx", "64", "--device", "cpu")
    flags = ("--pp", "8", "--tg", "4", "--repeats", "1", "--cold", "0")
    assert moecli("bench", name, *flags, *run).code == 0
    before = set(home.rglob("*usage*"))
    assert moecli("run", name, "Hello", "-n", "2", *run).code == 0
    assert set(home.rglob("*usage*")) > before == set()
