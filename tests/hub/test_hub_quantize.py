"""`moecli quantize org/name` against a stand-in hub: what a local conversion gives, always."""

import json
import re
from pathlib import Path

import pytest

from moecli.conversion import quantize_from_hub, quantize_model
from moecli.errors import MoecliError
from moecli.hub.client import Caller
from quant.errors import QuantError
from quant.job import ConversionResult
from quant.scheme import QuantScheme
from tests.commands import Command
from tests.e2e import tiny
from tests.hub.conftest import REPO
from tests.hub.standin import Fault, Repo, StandInHub

INT4, INT8 = QuantScheme(4, 32), QuantScheme(8, 32)
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(autouse=True)
def _short_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first range of these small files is all of them."""
    monkeypatch.setattr("moecli.hub.streaming._FIRST_NBYTES", 8192)


def downloads(hub: StandInHub, repo: Repo, name: str) -> int:
    """How often a file was asked for from its beginning to its end."""
    size = (repo.path / name).stat().st_size
    return len([asked for asked in hub.bodies(name) if asked.range == f"bytes=0-{size - 1}"])


@pytest.fixture(scope="module")
def expected(served: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every byte of a local, undisturbed conversion."""
    out = tmp_path_factory.mktemp("expected") / "out"
    quantize_model(served, out, INT4, INT8)
    return tree(out)


def tree(path: Path) -> dict[str, bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def quantize(out: Path, notes: list[str] | None = None, **given) -> ConversionResult:  # type: ignore[no-untyped-def]
    caller = Caller((notes if notes is not None else []).append)
    return quantize_from_hub(REPO, given.pop("revision", None), out, INT4, INT8, caller, **given)


def test_the_result_is_that_of_a_local_checkpoint(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, expected: dict[str, bytes]
) -> None:
    outcome = moecli("quantize", REPO, "--dense", "int8-g32")
    assert outcome.code == 0, outcome.err
    out = home / ".local/share/moecli/models/tiny-llama-int4-g32"
    assert tree(out) == expected
    assert not out.with_name(out.name + ".partial").exists()
    assert "next: moecli chat tiny-llama-int4-g32" in outcome.err
    assert not list((home / "cache").rglob("*.safetensors")), "weights do not stay in the cache"
    for name in (file.name for file in repo.path.glob("*.safetensors")):
        assert downloads(hub, repo, name) == 1


def test_few_requests_are_needed(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    quantize(tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    weights = [asked for asked in hub.asked if asked.path.startswith(f"/{REPO}/resolve/")]
    samples = 64 // 3
    assert len(weights) <= 3 * (2 + samples) + 10


@pytest.mark.parametrize("action", ["reset", "cut", "stalled", "flipped"])
def test_broken_connections_are_mended(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes], action: str
) -> None:
    size = (repo.path / SHARD).stat().st_size
    sha256 = hub.described(repo, SHARD)["lfs"]["sha256"]
    whole = f"bytes=0-{size - 1}"
    hub.faults = [Fault(sha256, 1, after=size - 2000, action=action, range=whole)]
    notes: list[str] = []
    quantize(tmp_path / "out", notes)
    assert hub.faults[0].times == 0
    assert tree(tmp_path / "out") == expected
    assert any(("damaged" if action == "flipped" else "connection") in note for note in notes)


@pytest.mark.parametrize("status", [503, 429])
def test_an_unwell_hub_is_asked_again(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes], status: int
) -> None:
    hub.faults = [Fault(match, 1, status=status) for match in ("/api/models", SHARD, "Signature")]
    quantize(tmp_path / "out")
    assert all(fault.times == 0 for fault in hub.faults)
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_hub_that_refuses_in_the_middle_keeps_what_is_finished(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes], status: int
) -> None:
    """As when a token is withdrawn: the same command goes on when it is given again."""
    out = tmp_path / "out"
    seen = []

    def refuse_after_the_first(progress: object) -> None:
        seen.append(progress)
        if len(seen) == 5:
            hub.faults = [Fault("00003-of", 99, status=status)]

    hub.rate = 1e6
    with pytest.raises(MoecliError):
        quantize(out, progress=refuse_after_the_first)
    assert not out.exists()
    journal = out.with_name("out.partial") / "journal"
    finished = journal.read_bytes().count(b'"unit"')
    hub.faults, hub.rate, hub.asked[:] = [], None, []
    result = quantize(out)
    assert result.units_resumed == finished > 5
    assert tree(out) == expected
    assert not downloads(hub, repo, "model-00001-of-00003.safetensors"), "it was there"


def test_a_moved_branch_does_not_mix(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """What began with one commit ends with it; the new one is another conversion."""
    out = tmp_path / "out"
    interrupt_after(6, out)
    old = repo.branches["main"]
    moved = tiny.write_checkpoint(tmp_path / "moved", tensors=tiny.llama4_tensors(seed=1), shards=3)
    hub.repos[REPO] = Repo(moved)
    new = hub.repos[REPO].branches["main"]
    with pytest.raises(QuantError, match="another conversion"):
        quantize(out, revision=new)
    with pytest.raises(MoecliError, match=f"no revision `{old}`"):
        quantize(out)
    hub.repos[REPO] = repo
    repo.branches = {"main": "f" * 40, "old": old}
    assert quantize(out).units_resumed > 5
    assert tree(out) == expected


def test_another_scheme_or_repository_does_not_mix(
    hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    interrupt_after(6, out)
    before = tree(out.with_name("out.partial"))
    other = tiny.write_checkpoint(tmp_path / "other", tensors=tiny.llama4_tensors(seed=1))
    hub.repos["org/other"] = Repo(other)
    caller = Caller([].append)
    with pytest.raises(QuantError, match="another conversion"):
        quantize_from_hub("org/other", None, out, INT4, INT8, caller)
    with pytest.raises(QuantError, match="another conversion"):
        quantize_from_hub(REPO, None, out, INT8, INT8, caller)
    assert tree(out.with_name("out.partial")) == before
    quantize(out)
    assert tree(out) == expected


def interrupt_after(units: int, out: Path) -> None:
    seen = []

    def interrupt(progress: object) -> None:
        seen.append(progress)
        if len(seen) == units:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(out, progress=interrupt)


def test_what_a_local_conversion_began_the_hub_may_finish(
    hub: StandInHub, repo: Repo, served: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Both are the same conversion: the fingerprint does not depend on where the files lie."""
    out = tmp_path / "out"
    seen = []

    def interrupt(progress: object) -> None:
        seen.append(progress)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(served, out, INT4, INT8, interrupt)
    assert quantize(out).units_resumed >= 20
    assert tree(out) == expected


def test_files_that_are_cached_are_not_downloaded(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, expected: dict[str, bytes]
) -> None:
    assert moecli("pull", REPO).code == 0
    blob = (
        home / "cache/models--org--tiny-llama/blobs" / hub.described(repo, SHARD)["lfs"]["sha256"]
    )
    (home / "cache/models--org--tiny-llama/snapshots" / repo.commit / SHARD).unlink()
    content = blob.read_bytes()
    hub.asked.clear()
    quantize(home / "out")
    assert tree(home / "out") == expected
    assert not downloads(hub, repo, SHARD)
    assert blob.read_bytes() == content


def test_a_packing_that_is_not_read_is_refused_before_weights_come(
    moecli: Command, hub: StandInHub, tmp_path: Path
) -> None:
    config = {**tiny.llama4_config(), "quantization_config": {"quant_method": "hqq"}}
    hub.repos["org/hqq"] = Repo(tiny.write_checkpoint(tmp_path / "hqq", config, shards=2))
    outcome = moecli("quantize", "org/hqq", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "the source is quantized with `hqq`, which is not read" in outcome.err
    assert "GPTQ (4 and 8 bits)" in outcome.err
    assert not (tmp_path / "out.partial").exists()


def test_a_header_that_lies_is_told(moecli: Command, hub: StandInHub, tmp_path: Path) -> None:
    path = tiny.write_checkpoint(tmp_path / "bad")
    content = bytearray((path / "model.safetensors").read_bytes())
    content[:8] = (1 << 40).to_bytes(8, "little")
    (path / "model.safetensors").write_bytes(content)
    hub.repos["org/bad"] = Repo(path)
    outcome = moecli("quantize", "org/bad", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert "claims a header of" in outcome.err


def test_dry_run_says_what_comes_and_writes_nothing(
    moecli: Command, hub: StandInHub, repo: Repo, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    command = ("quantize", REPO, "--dense", "int8-g32", "-o", tmp_path / "out", "--dry-run")
    outcome = moecli(*command, "--json")
    assert outcome.code == 0, outcome.err
    seen = json.loads(outcome.out)
    sizes = [file.stat().st_size for file in repo.path.glob("*.safetensors")]
    assert seen["download_nbytes"] == sum(sizes)
    assert seen["out_nbytes"] == len(expected["model.safetensors"])
    assert seen["peak_disk_nbytes"] == seen["out_nbytes"] + max(sizes)
    assert seen["bpw_experts"] == 4.5
    assert seen["network_rate"] > 0
    assert not (tmp_path / "out.partial").exists()
    slow = moecli(*command, "--rate", "10kB/s").out
    assert re.search(r"^time\t\d+\.\d$", slow, re.M), slow
    assert f"network\t{10_000}\n" in slow
    seconds = float(slow.rpartition("\t")[2])
    assert seconds == pytest.approx(sum(sizes) / 10_000, rel=0.01)


def test_dry_run_counts_what_is_here_already(
    moecli: Command, hub: StandInHub, repo: Repo, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt_after(6, out)
    command = ("quantize", REPO, "--dense", "int8-g32", "-o", out, "--dry-run", "--json")
    seen = json.loads(moecli(*command).out)
    sizes = [file.stat().st_size for file in repo.path.glob("*.safetensors")]
    assert 0 < seen["download_nbytes"] < sum(sizes)
    assert moecli("pull", REPO).code == 0
    seen = json.loads(moecli(*command).out)
    assert seen["download_nbytes"] == 0
    assert seen["network_rate"] is None
    assert seen["peak_disk_nbytes"] == seen["out_nbytes"]


def test_revisions_are_of_repositories(moecli: Command, served: Path) -> None:
    outcome = moecli("quantize", served, "--revision", "main")
    assert outcome.code == 2
    assert "has no revisions" in outcome.err


def test_a_long_header_is_read_in_two_steps(
    hub: StandInHub,
    repo: Repo,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moecli.hub.streaming._FIRST_NBYTES", 100)
    quantize(tmp_path / "out")
    assert tree(tmp_path / "out") == expected
