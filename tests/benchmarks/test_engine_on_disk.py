"""The measurement of the disk as a tier, in sizes whose figures mean nothing."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import disk_tier
from benchmarks.disk.watch import Watch
from benchmarks.made_up import qwen3_config, write_model
from offload.disk import DiskTier, ExpertSpan
from quant.checkpoint import QuantizedCheckpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of whole pages, 2 of 16 in each of two layers."""
    return write_model(
        tmp_path_factory.mktemp("disk") / "tiny", qwen3_config(2, 256, 256, 16, 2, 4, 2)
    )


def spans(model: Path) -> dict[tuple[int, int], ExpertSpan]:
    checkpoint = QuantizedCheckpoint.open(model)
    return {(0, expert): ExpertSpan(*checkpoint.expert_span(0, expert)) for expert in range(16)}


def test_an_engine_is_measured_and_kept_beside_what_was(model: Path, monkeypatch, capsys) -> None:
    disk = DiskTier(spans(model), drop_cache=True)
    direct = disk.direct
    disk.close()
    if not direct:
        pytest.skip("the file system has no direct reads")
    monkeypatch.setitem(disk_tier.MODELS, "Scout", {})
    monkeypatch.setattr("benchmarks.disk.ceiling.CEILING_S", 0.02)
    monkeypatch.setattr(disk_tier, "write_model", lambda path, config: model)
    report = model.parent / "report.json"
    report.write_text('{"asked": "before"}')
    flags = ["--rounds", "1", "--models", "Scout", "--json", str(report), "--most-bw", "5e7"]
    flags += ["--prompts", "8", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["disk_tier.py", str(model.parent), *flags])
    disk_tier.main()
    found = json.loads(report.read_text())
    assert found["asked"] == "before"
    (measured,) = found["engine, disk of 0.05 GB/s"]["models"]
    assert measured["slots"] == measured["experts"] // 3
    assert {row["test"] for row in measured["rows"]} == {"prompt of 8", "answer of 4"}
    for row in measured["rows"]:
        assert 0 < row["share"] <= 1.05
        assert 0 <= row["idle"] < 1
        assert 0 < row["used"] <= 1
    assert "| answer of 4 |" in capsys.readouterr().out


def test_time_without_a_read_is_what_no_read_covers() -> None:
    watch = Watch()
    watch._reads = [(5.0, 7.0), (1.0, 3.0), (2.0, 4.0), (9.0, 20.0)]
    assert watch.idle_seconds(0.0, 10.0) == pytest.approx(1 + 1 + 2)
    assert watch.idle_seconds(0.0, 22.0) == pytest.approx(1 + 1 + 2 + 2)


def test_a_slower_disk_takes_its_time_and_gives_the_same_bytes(model: Path) -> None:
    disk, watch = DiskTier(spans(model)), Watch(most_bw=1e6)
    key = (0, 3)
    nbytes = disk.nbytes_of(key)
    fast, slow = bytearray(nbytes), bytearray(nbytes)
    disk.read_into(key, memoryview(fast))
    begin = time.perf_counter()
    with watch.on():
        assert disk.read_into(key, memoryview(slow)) == nbytes
    assert time.perf_counter() - begin >= 0.99 * nbytes / 1e6
    assert slow == fast
    disk.close()
