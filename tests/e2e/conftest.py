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
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fresh tiny 16-bit checkpoint that a test may damage."""
    return tiny.write_checkpoint(tmp_path / "source")


def quantize(source: Path, out: Path, dense_group_size: int) -> Path:
    from moecli.conversion import quantize_model
    from quant.scheme import QuantScheme

    quantize_model(source, out, QuantScheme(4, 32), QuantScheme(8, dense_group_size))
    return out


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Llama 4 that no test changes."""
    root = tmp_path_factory.mktemp("tiny")
    return quantize(tiny.write_checkpoint(root / "source"), root / "quantized", 32)


@pytest.fixture(scope="session")
def quantized_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Qwen3-MoE, several experts a token, that no test changes."""
    root = tmp_path_factory.mktemp("tiny-qwen3")
    source = tiny.write_checkpoint(root / "source", tiny.qwen3_config(), tiny.qwen3_tensors())
    return quantize(source, root / "quantized", 32)


@pytest.fixture(scope="session")
def quantized_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized as the command does it."""
    from moecli import store

    return quantize(store.demo_source(), tmp_path_factory.mktemp("demo") / "quantized", 128)
