"""Fixtures that several end-to-end tests share: the command, and tiny quantized models."""

from pathlib import Path

import pytest

from tests.commands import Command, Outcome, home, real_cli
from tests.e2e import tiny

__all__ = ["Command", "Outcome", "home", "real_cli"]


@pytest.fixture
def moecli(home: Path, real_cli: Command) -> Command:
    """Runs the real command, with no fake behind it."""
    return real_cli


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fresh tiny 16-bit checkpoint that a test may damage."""
    return tiny.write_checkpoint(tmp_path / "source")


def quantize(source: Path, out: Path, dense_group_size: int) -> Path:
    from moecli.conversion import quantize_model
    from quant.scheme import QuantScheme

    quantize_model(source, out, QuantScheme(4, 32), QuantScheme(8, dense_group_size))
    return out


def saved_family(directory: Path, family: str, **changes: object) -> Path:
    """A tiny model of a family as transformers saves it, with a tokenizer."""
    from tests.models.families import FAMILIES
    from tests.models.tiny_models import oracle

    model = oracle(family, **(FAMILIES[family].wide | {"vocab_size": tiny.VOCAB} | changes))
    model.bfloat16().save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


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


@pytest.fixture(scope="session")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with some 40 MiB of experts, far more than some budgets."""
    root = tmp_path_factory.mktemp("wide")
    experts, inner = 96, 1024
    config = tiny.llama4_config() | {"num_local_experts": experts, "intermediate_size": inner}
    tensors = tiny.llama4_tensors(experts=experts, inner=inner)
    return quantize(tiny.write_checkpoint(root / "source", config, tensors), root / "out", 32)
