"""`show` and `plan` of a repository of the hub: little comes, and it says enough."""

import json
from pathlib import Path

import pytest

from moecli.hub.client import Caller
from tests.commands import Command
from tests.hub.conftest import REPO
from tests.hub.standin import Fault, Repo, StandInHub


def assert_only_heads_came(hub: StandInHub, home: Path) -> None:
    assert not hub.bodies()
    (snapshot,) = (home / "cache" / "models--org--tiny-llama" / "snapshots").iterdir()
    names = sorted(file.name for file in snapshot.iterdir())
    assert names == ["config.json", "model.safetensors.index.json"]


def test_show_takes_config_and_index_alone(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    shown = json.loads(moecli("show", REPO, "--json").out)
    assert shown["name"] == "tiny-llama"
    assert shown["num_experts"] == 4
    assert not shown["quantized_here"]
    weights = sum(f.stat().st_size for f in repo.path.glob("*.safetensors"))
    assert weights < shown["nbytes"] < weights + 100_000
    assert_only_heads_came(hub, home)


def test_plan_takes_config_and_index_alone(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    rates = ("--ram-bw", "10GB/s", "--cpu-bw", "10GB/s", "--disk", "1GB/s", "--device", "cpu")
    outcome = moecli("plan", REPO, "--ram", "1GiB", "--json", *rates)
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["model"] == "tiny-llama"
    assert plan["vllm"]["commands"][0] == f"moecli quantize {REPO} -q int4-g32 --dense none"
    assert_only_heads_came(hub, home)


def test_what_was_looked_at_is_known_offline(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = json.loads(moecli("show", REPO, "--json").out)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = json.loads(moecli("show", REPO, "--json").out)
    assert offline["num_params"] == shown["num_params"]
    assert 0.9 * shown["nbytes"] < offline["nbytes"] < shown["nbytes"]
    assert "forbids to ask the hub" in moecli("show", "org/other").err
    assert "is not whole in the cache" in moecli("pull", REPO).err, "a look is no pull"


@pytest.mark.parametrize("command", ["show", "plan", "pull"])
def test_a_hub_out_of_reach_is_given_up_within_seconds(
    moecli: Command, hub: StandInHub, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    now = [0.0]
    monkeypatch.setattr("moecli.hub.client.time.monotonic", lambda: now[0])
    monkeypatch.setattr("moecli.hub.client.PAUSES_S", (1.0, 2.0, 4.0, 8.0, 16.0))

    def pause(caller: Caller, seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(Caller, "pause", pause)
    outcome = moecli(command, REPO)
    assert outcome.code == 1
    assert now == [3.0], "31 seconds are for downloads that have begun"
    assert "error: cannot reach http://127.0.0.1:9" in outcome.err
    assert "\nhint: check the connection" in outcome.err


def test_a_hub_that_is_there_but_unwell_is_waited_for(
    moecli: Command, hub: StandInHub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecli.hub.client.FIRST_PATIENCE_S", 0.0)
    hub.faults = [Fault("/api/models/", 2, status=503)]
    outcome = moecli("show", REPO)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("the hub is unwell (503)") == 2


def test_a_directory_goes_before_a_repository(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    (home / "org").mkdir()
    (home / REPO).symlink_to(repo.path)
    assert json.loads(moecli("show", REPO, "--json").out)["num_experts"] == 4
    assert not hub.asked


def test_what_was_pulled_is_quantized_under_the_name_of_the_repository(
    moecli: Command, hub: StandInHub, repo: Repo, home: Path
) -> None:
    assert moecli("pull", REPO).code == 0
    outcome = moecli("quantize", REPO, "--dense", "int8-g32")
    assert outcome.code == 0, outcome.err
    assert (home / ".local/share/moecli/models/tiny-llama-int4-g32/moecli.json").is_file()
