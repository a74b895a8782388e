"""Fixtures: the command in this process with a fake engine, in a home of its own."""

import sys
from pathlib import Path

import pytest

from tests.cli import fakes
from tests.commands import Command, Outcome, home, real_cli

__all__ = ["Command", "Outcome", "home", "real_cli"]


@pytest.fixture(autouse=True)
def at_home(home: Path) -> None:
    """No test here sees the settings of whoever runs it."""


@pytest.fixture
def models(home: Path) -> Path:
    """The directory of the store."""
    path = home / ".local/share/moecli/models"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def cli(real_cli: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs one command line with the fake engine."""
    fakes.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    monkeypatch.setattr(fakes.FakeEngine, "opened", [])
    return real_cli


@pytest.fixture
def model(models: Path) -> str:
    """The name of a model in the store."""
    return fakes.write_model(models / "tiny-int4-g32").name
