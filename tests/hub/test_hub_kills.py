"""Conversions from the hub that are killed, and what they take of disk and memory.

MOECLI_SOAK=1 (`make soak`) makes a hundred kills of a few, and a gigabyte of the small checkpoint.
"""

import os
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from moecli.conversion import quantize_model
from quant.scheme import QuantScheme
from quant.supply import FileTurn
from tests.e2e import tiny
from tests.hub.converting import REPO, report_of, start
from tests.hub.standin import Repo, StandInHub, stand_in

SOAK = os.environ.get("MOECLI_SOAK", "") not in ("", "0")
KILLS = 100 if SOAK else 3
# What comes on top of result and largest file: chunks on their way, config, journal, whole blocks.
SLACK_NBYTES = 600_000
MEMORY_NBYTES = 32 << 20


@pytest.fixture
def server() -> Iterator[StandInHub]:
    with stand_in() as hub:
        yield hub


def write_checkpoint(path: Path, experts: int, inner: int, shards: int) -> Path:
    config = {**tiny.llama4_config(), "num_local_experts": experts, "intermediate_size": inner}
    tensors = tiny.llama4_tensors(experts=experts, inner=inner)
    return tiny.write_checkpoint(path, config, tensors, shards)


def tree(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def disk_nbytes(path: Path) -> int:
    """What the files of a directory take of the disk: holes take nothing."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(Path(directory) / name).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def watch(process: BaseProcess, partial: Path, seconds: float) -> int:
    """Wait for the end of a process or of the time; returns the most that the disk held."""
    most, end = 0, time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        most = max(most, disk_nbytes(partial))
        process.join(0.004)
    return most


def units_on_record(partial: Path) -> int:
    journal = partial / "journal"
    return journal.read_bytes().count(b'"unit"') if journal.exists() else 0


def long_requests(hub: StandInHub) -> set[str]:
    """The files of which more was asked for than headers and samples."""
    found = set()
    for asked in hub.bodies(".safetensors"):
        start, stop = (int(n) for n in (asked.range or "").removeprefix("bytes=").split("-"))
        if stop - start >= 20_000:
            found.add(asked.path.partition("?file=")[2].partition("&")[0].rpartition("/")[2])
    return found


def test_killed_at_random_moments(server: StandInHub, tmp_path: Path) -> None:
    """Every result is that of an undisturbed run; nothing that was finished is done again."""
    source = write_checkpoint(tmp_path / "source", experts=32, inner=256, shards=8)
    server.repos[REPO] = Repo(source)
    quantize_model(source, tmp_path / "expected", QuantScheme(4, 32), QuantScheme(8, 32))
    expected = tree(tmp_path / "expected")
    allowed = sum(map(len, expected.values())) + SLACK_NBYTES
    allowed += max(file.stat().st_size for file in source.glob("*.safetensors"))
    moments, kills, attempt, most = random.Random(KILLS), 0, 0, 0
    server.rate = 15e6
    while kills < KILLS:
        attempt += 1
        out, report = tmp_path / f"out{attempt}", tmp_path / "report"
        partial = out.with_name(out.name + ".partial")
        released: set[str] = set()
        while not out.exists():
            before = units_on_record(partial)
            server.asked.clear()
            process = start(server.url, tmp_path / f"cache{attempt}", out, report)
            # The later kills of a conversion are spared: it must come to its end.
            last = kills >= KILLS or random.Random(attempt).random() < 0.1 * kills % 1.0
            most = max(most, watch(process, partial, 99 if last else moments.uniform(0.05, 1.0)))
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            asked_for = long_requests(server)
            assert not released & asked_for, "a finished file was downloaded again"
            if report.exists():
                assert report_of(report)["resumed"] >= before
                break
            if (partial / "moecli.json").exists() or out.exists():
                continue
            assert units_on_record(partial) >= before, "finished work was lost"
            there = {f.name.partition(".moecli")[0] for f in (partial / "source").glob("*")}
            released |= asked_for - there
        assert tree(out) == expected
        assert not partial.exists()
    assert most <= allowed, f"{most} bytes on disk, {allowed} are promised"
    assert most > allowed / 3, "nothing was measured"


def test_disk_and_memory_are_bounded(server: StandInHub, tmp_path: Path) -> None:
    """Of a checkpoint many times larger than what may be in memory."""
    inner = 4096
    experts = 112 if SOAK else 8
    source = write_checkpoint(tmp_path / "source", experts, inner, shards=20)
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert nbytes > (20 if SOAK else 1.5) * MEMORY_NBYTES
    server.repos[REPO] = Repo(source)
    out, report = tmp_path / "out", tmp_path / "report"
    process = start(server.url, tmp_path / "cache", out, report)
    most = watch(process, out.with_name("out.partial"), 600)
    process.join()
    grown = report_of(report)["grown"]
    result = sum(file.stat().st_size for file in out.iterdir())
    assert grown < MEMORY_NBYTES + 3 * tiny.HIDDEN * inner * 2, f"{grown >> 20} MiB"
    assert result < most <= result + largest + SLACK_NBYTES
    print(f"{nbytes >> 20} MiB: {grown >> 20} MiB of memory, {most >> 20} MiB of disk")


def test_a_later_file_that_was_left_does_not_take_the_room_of_the_first(
    hub: StandInHub, tmp_path: Path
) -> None:
    """As after a power failure that has damaged what came of the first file."""
    from moecli.hub.client import Caller, describe
    from moecli.hub.streaming import HubSupply

    source = write_checkpoint(tmp_path / "source", experts=8, inner=64, shards=3)
    hub.repos[REPO] = Repo(source)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    left = tmp_path / "left"
    left.mkdir()
    (left / names[2]).write_bytes((source / names[2]).read_bytes())
    (left / f"{names[1]}.moecli-incomplete").write_bytes(b"half")
    caller = Caller(print)
    supply = HubSupply(describe(REPO, None, caller), names, left, caller, lambda nbytes: None)
    supply.begin([FileTurn(names[0], 200), FileTurn(names[1], 100), FileTurn(names[2], 0)])
    for name in names:
        supply.take(name)
        assert (left / name).read_bytes() == (source / name).read_bytes()
        supply.release(name)
    supply.close()
    assert [file.name for file in left.iterdir()] == ["repository.json"]


def test_the_next_file_comes_while_one_is_quantized(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download of the second file has begun before the first is let go."""
    from moecli.conversion import quantize_from_hub
    from moecli.hub.client import Caller
    from moecli.hub.streaming import HubSupply

    source = write_checkpoint(tmp_path / "source", experts=8, inner=64, shards=4)
    hub.repos[REPO] = Repo(source)
    monkeypatch.setattr("moecli.hub.streaming._FIRST_NBYTES", 16384)
    seen: list[tuple[str, bool]] = []
    release = HubSupply.release

    def watched(supply: HubSupply, name: str) -> None:
        number = int(name.split("-")[1])
        following = f"model-{number + 1:05}-of-00004.safetensors"
        deadline = time.monotonic() + 20
        while number < 3 and following not in long_requests(hub):
            assert time.monotonic() < deadline, "the next file does not come"
            time.sleep(0.01)
        seen.append((name, following in long_requests(hub)))
        release(supply, name)

    monkeypatch.setattr(HubSupply, "release", watched)
    torch.set_num_threads(1)
    int8 = QuantScheme(8, 32)
    quantize_from_hub(REPO, None, tmp_path / "out", int8, int8, Caller(print))
    assert [begun for _, begun in seen] == [True, True, True, False]
