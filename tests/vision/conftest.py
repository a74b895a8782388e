"""Fixtures that the tests of pictures share: a tiny model that sees, and the command."""

from pathlib import Path

import pytest

from tests.commands import Command, Outcome, home, real_cli
from tests.vision import seeing

__all__ = ["Command", "Outcome", "home", "real_cli"]


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 with a vision tower, quantized, that no test changes."""
    from moecli.conversion import quantize_model
    from quant.scheme import QuantScheme

    root = tmp_path_factory.mktemp("seeing")
    source = seeing.write_checkpoint(root / "source")
    quantize_model(source, root / "quantized", QuantScheme(4, 32), QuantScheme(8, 32))
    return root / "quantized"
