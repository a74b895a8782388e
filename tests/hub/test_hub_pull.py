"""`moecli pull` against a stand-in hub: what comes, what is kept, what is said."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.commands import Command
from tests.hub.conftest import REPO
from tests.hub.standin import Fault, Repo, StandInHub

WANTED = [
    *("LICENSE", "config.json", "generation_config.json"),
    *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
]


def snapshot(home: Path, repo: Repo) -> Path:
    return home / "cache" / "models--org--tiny-llama" / "snapshots" / repo.commit


def assert_whole(path: Path, repo: Repo) -> None:
    assert sorted(file.name for file in path.iterdir()) == WANTED
    for name in WANTED:
        assert (path / name).read_bytes() == (repo.path / name).read_bytes(), name
    left = [file.name for file in (path.parents[1] / "blobs").iterdir()]
    assert not [name for name in left if "incomplete" in name]


def test_only_what_a_model_needs_comes_and_the_path_is_printed(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    outcome = moecli("pull", REPO)
    assert (outcome.code, outcome.out) == (0, f"{snapshot(home, repo)}\n")
    assert_whole(snapshot(home, repo), repo)
    assert outcome.err.splitlines()[-1] == f"next: moecli quantize {REPO}"
    assert "pulling: 100%" in outcome.err
    assert not [asked for asked in hub.asked if "xet-read-token" in asked.path]


def test_other_tools_find_what_was_pulled(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    import huggingface_hub

    assert moecli("pull", REPO).code == 0
    found = huggingface_hub.snapshot_download(REPO, cache_dir=home / "cache", local_files_only=True)
    assert Path(found) == snapshot(home, repo)
    bodies = len(hub.bodies())
    for name in WANTED:
        huggingface_hub.hf_hub_download(REPO, name, cache_dir=home / "cache", endpoint=hub.url)
    assert len(hub.bodies()) == bodies
    (cached,) = huggingface_hub.scan_cache_dir(home / "cache").repos
    assert cached.repo_id == REPO
    assert [sorted(revision.refs) for revision in cached.revisions] == [["main"]]


def test_what_other_tools_have_downloaded_is_taken(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.snapshot_download(REPO, cache_dir=home / "cache", endpoint=hub.url)
    bodies = len(hub.bodies())
    outcome = moecli("pull", REPO)
    assert outcome.out == f"{snapshot(home, repo)}\n"
    assert len(hub.bodies()) == bodies


def test_a_second_call_asks_once_and_an_offline_one_never(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moecli("pull", REPO)
    hub.asked.clear()
    assert moecli("pull", REPO).out == first.out
    assert [asked.path.partition("?")[0] for asked in hub.asked] == [f"/api/models/{REPO}"]
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = moecli("pull", REPO, "--quiet")
    assert (offline.code, offline.out, offline.err) == (0, first.out, "")
    assert not hub.asked


def test_without_a_connection_what_is_cached_is_taken_and_said(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = moecli("pull", REPO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    outcome = moecli("pull", REPO)
    assert (outcome.code, outcome.out) == (0, first.out)
    assert "taking what is in the cache" in outcome.err
    shutil.rmtree(Path(first.out.strip()).parents[2])
    outcome = moecli("pull", REPO)
    assert (outcome.code, outcome.out) == (1, "")
    assert "cannot reach http://127.0.0.1:9" in outcome.err
    assert "hint: check the connection" in outcome.err


def test_offline_and_not_cached(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert "HF_HUB_OFFLINE forbids to ask the hub" in outcome.err
    assert not hub.asked


def test_a_half_downloaded_cache_is_not_taken_for_a_model(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moecli("pull", REPO).code == 0
    (snapshot(home, repo) / WANTED[4]).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert moecli("pull", REPO).code == 1


@pytest.mark.parametrize("action", ["reset", "cut", "stalled", "flipped"])
def test_broken_downloads_are_mended(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, action: str
) -> None:
    shard = hub.described(repo, WANTED[4])["lfs"]["sha256"]
    hub.faults = [Fault(shard, 1, after=3000, action=action)]
    outcome = moecli("pull", REPO)
    assert outcome.code == 0, outcome.err
    assert_whole(snapshot(home, repo), repo)
    ranges = [asked.range for asked in hub.bodies(shard)]
    size = (repo.path / WANTED[4]).stat().st_size
    assert ranges[0] == f"bytes=0-{size - 1}"
    assert len(ranges) == 2
    if action == "flipped":
        assert "arrived damaged; downloading it again" in outcome.err
        assert ranges[1] == ranges[0]
    else:
        assert "the connection failed" in outcome.err
        begin = int(ranges[1].split("=")[1].split("-")[0])
        # A reset may take with it what had arrived.
        assert 0 <= begin <= 3000 if action == "reset" else 0 < begin <= 3000


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    hub.ignores_ranges = True
    hub.faults = [Fault(hub.described(repo, WANTED[4])["lfs"]["sha256"], after=3000, action="cut")]
    outcome = moecli("pull", REPO)
    assert outcome.code == 0, outcome.err
    assert "damaged" not in outcome.err
    assert_whole(snapshot(home, repo), repo)


@pytest.mark.parametrize("status", [503, 429, 500, 408])
def test_an_unwell_hub_is_asked_again(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path, status: int
) -> None:
    hub.faults = [
        Fault("/api/models", 2, status=status),
        Fault("/resolve/", status=status),
        Fault("Signature", status=status),
    ]
    outcome = moecli("pull", REPO)
    assert outcome.code == 0, outcome.err
    assert_whole(snapshot(home, repo), repo)
    assert f"({status})" in outcome.err
    assert "trying again in 0 s" in outcome.err


def test_the_hub_says_how_long_to_wait(moecli: Command, hub: StandInHub, repo: Repo) -> None:
    began = time.monotonic()
    hub.faults = [
        Fault("/api/models", status=429, headers={"Retry-After": "1"}),
        Fault("/api/models", status=429, headers={"RateLimit": '"api";r=0;t=1'}),
    ]
    outcome = moecli("pull", REPO)
    assert outcome.code == 0
    assert outcome.err.count("limits how often it is asked (429); trying again in 1 s") == 2
    assert time.monotonic() - began > 2


def test_a_hub_that_asks_for_too_much_patience(
    moecli: Command, hub: StandInHub, repo: Repo
) -> None:
    hub.faults = [Fault("/api/models", 9, status=429, headers={"Retry-After": "4000"})]
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert "asks for a longer pause (429)" in outcome.err
    assert len(hub.asked) == 1


def test_a_hub_that_stays_down_ends_it_and_keeps_what_came(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    shard = hub.described(repo, WANTED[4])["lfs"]["sha256"]
    hub.faults = [Fault(shard, 1, after=70_000), Fault(shard, 3, status=503)]
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert f"the hub refuses `{REPO}` (503)" in outcome.err
    assert "the same command goes on where this one stopped" in outcome.err
    hub.faults, hub.asked[:] = [], []
    assert moecli("pull", REPO).code == 0
    (asked,) = hub.bodies(shard)
    assert asked.range is not None
    assert not asked.range.startswith("bytes=0-")
    assert_whole(snapshot(home, repo), repo)


def test_what_is_damaged_twice_is_not_believed(
    moecli: Command, hub: StandInHub, repo: Repo
) -> None:
    hub.faults = [Fault("Signature", 9, after=100, action="flipped")]
    outcome = moecli("pull", REPO)
    assert (outcome.code, outcome.out) == (1, "")
    assert "arrives with a wrong checksum" in outcome.err


def test_small_files_are_checked_too(moecli: Command, hub: StandInHub, repo: Repo) -> None:
    hub.faults = [Fault("api/resolve-cache", 9, after=5, action="flipped")]
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert "arrives with a wrong checksum" in outcome.err


def test_killed_downloads_go_on_where_they_were(
    hub: StandInHub, repo: Repo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.rate = 300_000.0
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(home / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "moecli", "pull", REPO, "--quiet"]
    blobs = home / "cache" / "models--org--tiny-llama" / "blobs"

    def arrived() -> int:
        total = 0
        for file in blobs.glob("*") if blobs.exists() else ():
            with suppress(FileNotFoundError):  # it has just got its name
                total += file.stat().st_size
        return total

    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while arrived() < 250_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = arrived()
    assert 250_000 <= kept < sum(file.stat().st_size for file in repo.path.iterdir())
    hub.rate, hub.asked[:] = None, []
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(Path(done.stdout.strip()), repo)
    starts = [int(a.range.split("=")[1].split("-")[0]) for a in hub.bodies() if a.range]
    assert sum(starts) > 0, "nothing was taken up"


def test_a_left_over_that_is_damaged_is_noticed(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    shard = hub.described(repo, WANTED[4])["lfs"]["sha256"]
    blobs = home / "cache" / "models--org--tiny-llama" / "blobs"
    blobs.mkdir(parents=True)
    size = (repo.path / WANTED[4]).stat().st_size
    for left in (b"x" * 1000, b"x" * size, b"x" * (size + 1)):
        (blobs / f"{shard}.moecli-incomplete").write_bytes(left)
        assert moecli("pull", REPO).code == 0
        assert_whole(snapshot(home, repo), repo)
        (blobs / shard).unlink()
        shutil.rmtree(blobs.parent / "snapshots")


def test_dry_run_downloads_no_weights(moecli: Command, hub: StandInHub, repo: Repo) -> None:
    outcome = moecli("pull", REPO, "--dry-run")
    assert outcome.code == 0
    names = sorted(line.split("\t")[1] for line in outcome.out.splitlines())
    assert names == WANTED
    assert outcome.err.endswith("to download\n")
    assert not hub.bodies()
    assert moecli("pull", REPO).code == 0
    again = moecli("pull", REPO, "--dry-run")
    assert again.out.count("here already") == len(WANTED)
    assert again.err.startswith("0 B of ")


def test_a_full_disk_is_seen_before(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert "more; `" in outcome.err
    assert "has 1000 B free" in outcome.err
    assert not hub.bodies()


def test_a_disk_that_fills_up(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moecli.hub.fetch.os.write", full)
    outcome = moecli("pull", REPO)
    monkeypatch.undo()
    assert outcome.code == 1
    assert "No space left on device" in outcome.err
    assert "hint: make room" in outcome.err


@pytest.mark.parametrize("token", [None, "stranger"])
def test_gated_repositories_are_explained(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    repo.gated, repo.token = True, "friend"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    outcome = moecli("pull", REPO)
    repo.gated, repo.token = False, None
    assert (outcome.code, outcome.out) == (1, "")
    assert f"`{REPO}` is gated" in outcome.err
    assert f"{hub.url}/{REPO}" in outcome.err
    assert "`hf auth login`" in outcome.err
    assert ("has no access" in outcome.err) == (token is not None)


def test_a_token_opens_private_and_gated_ones_and_stays_with_the_hub(
    moecli: Command, hub: StandInHub, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/closed"] = Repo(served, private=True, gated=True, token="friend")
    refused = moecli("pull", "org/closed")
    assert refused.code == 1
    assert f"{hub.url} has no `org/closed`, or it is private" in refused.err
    assert "set HF_TOKEN" in refused.err
    monkeypatch.setenv("HF_TOKEN", "friend")
    assert moecli("pull", "org/closed").code == 0
    assert {asked.token for asked in hub.asked if asked.server == "cdn"} == {None}


def test_an_invalid_token_is_told(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.wants_token = "right"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    outcome = moecli("pull", REPO)
    assert outcome.code == 1
    assert "the hub does not know your token" in outcome.err


def test_names_and_revisions_that_do_not_exist(
    moecli: Command, hub: StandInHub, repo: Repo
) -> None:
    assert f"{hub.url} has no `org/other`" in moecli("pull", "org/other").err
    outcome = moecli("pull", REPO, "--revision", "v9")
    assert outcome.code == 1
    assert f"`{REPO}` has no revision `v9`" in outcome.err
    for name in ("tiny", "a/b/c", "./tiny", "https://huggingface.co/org/x"):
        outcome = moecli("pull", name)
        assert outcome.code == 2, name
        assert "is no repository of the hub" in outcome.err


def test_a_revision_is_kept_apart(moecli: Command, hub: StandInHub, repo: Repo, home: Path) -> None:
    repo.branches["v1"] = repo.commit
    assert moecli("pull", REPO, "--revision", "v1").code == 0
    references = home / "cache" / "models--org--tiny-llama" / "refs"
    assert [file.name for file in references.iterdir()] == ["v1"]
    assert moecli("pull", REPO, "--revision", repo.commit).code == 0


def test_only_pickles_are_refused(moecli: Command, hub: StandInHub, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    hub.repos["org/pickled"] = Repo(path)
    outcome = moecli("pull", "org/pickled")
    assert outcome.code == 1
    assert "only pickled weights (`pytorch_model.bin`), which may run code" in outcome.err
    (path / "pytorch_model.bin").rename(path / "model.gguf")
    assert "neither `model.safetensors` nor" in moecli("pull", "org/pickled").err
    (path / "config.json").unlink()
    assert "has no `config.json`" in moecli("pull", "org/pickled").err


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "a/b.safetensors", "x.bin", ".safetensors"]
)
def test_an_index_cannot_lead_elsewhere(
    moecli: Command, hub: StandInHub, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "evil"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    hub.repos["org/evil"] = Repo(path)
    outcome = moecli("pull", "org/evil")
    assert outcome.code == 1
    assert "impossible file" in outcome.err
