"""`show` and `plan` of a repository of the hub: little comes, and it says enough."""

import json
from pathlib import Path

import pytest

from tests.commands import Command
from tests.hub.conftest import REPO
from tests.hub.standin import Repo, StandInHub


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
    assert json.loads(outcome.out)["model"] == "tiny-llama"
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
