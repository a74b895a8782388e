"""Fixtures: a stand-in hub with a tiny model, and a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Command, Outcome, home, real_cli
from tests.e2e import tiny
from tests.hub.standin import Repo, StandInHub, stand_in

__all__ = ["Command", "Outcome", "home", "real_cli"]
REPO = "org/tiny-llama"


@pytest.fixture
def moecli(home: Path, real_cli: Command) -> Command:
    """Runs the real command."""
    return real_cli


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[StandInHub]:
    """An empty hub; huggingface_hub asks it, without patience, and fills a cache in `home`."""
    from huggingface_hub import constants

    with stand_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr("moecli.hub.client.PAUSES_S", (0.01, 0.01))
        for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 in three shards, with files beside it that nobody needs."""
    path = tmp_path_factory.mktemp("served") / "tiny-llama"
    tiny.write_checkpoint(path, shards=3)
    (path / "README.md").write_text("hello\n")
    (path / "LICENSE").write_text("yours\n")
    (path / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (path / "modeling.py").write_text("raise SystemExit\n")
    (path / "original").mkdir()
    (path / "original" / "consolidated.safetensors").write_bytes(b"twice")
    return path


@pytest.fixture
def repo(hub: StandInHub, served: Path) -> Repo:
    """The tiny model, served."""
    hub.repos[REPO] = Repo(served)
    return hub.repos[REPO]
