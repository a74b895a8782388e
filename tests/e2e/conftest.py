"""Fixtures that several end-to-end tests share: the command, and tiny quantized models."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import tiny


@dataclass(frozen=True)
class Outcome:
    """What one call of the command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def moecli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Runs the command in this process, in a home of its own, and gives exit code and output."""
    for name in ("MOECLI_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def call(*args: str | Path, stdin: bytes | None = None) -> Outcome:
        from moecli.cli import main

        monkeypatch.setattr(sys, "argv", ["moecli", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        with pytest.raises(SystemExit) as exit_info:
            main()
            sys.exit(0)
        captured = capfd.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fresh tiny 16-bit checkpoint that a test may damage."""
    return tiny.write_checkpoint(tmp_path / "source")


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized model that no test changes."""
    from moecli.conversion import quantize_model
    from quant.scheme import QuantScheme

    root = tmp_path_factory.mktemp("tiny")
    source = tiny.write_checkpoint(root / "source")
    out = root / "quantized"
    quantize_model(source, out, QuantScheme(4, 32), QuantScheme(8, 32))
    return out
