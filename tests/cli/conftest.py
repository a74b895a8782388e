"""Fixtures: the command in this process with a fake engine, in a home of its own."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli import fakes


@dataclass(frozen=True)
class Outcome:
    """What one command line left."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test sees the settings, models or terminal of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("MOECLI_", "XDG_")) or name == "NO_COLOR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
def real_cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs one command line."""
    from moecli.cli import run_app

    def call(*args: str | Path, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run_app([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(models: Path) -> str:
    """The name of a model in the store."""
    return fakes.write_model(models / "tiny-int4-g32").name
