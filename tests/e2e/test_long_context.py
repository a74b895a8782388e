"""Contexts up to the model's own maximum, as far as the plan says that they fit."""

import re
from pathlib import Path

import pytest

from moecli.config import EngineConfig, SamplingConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from quant.scheme import QuantScheme
from tests.commands import Command
from tests.e2e import tiny

MAXIMUM = 512  # of the tiny model
MILLION = 1 << 20


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 that takes a million tokens; one layer of four keeps them all."""
    root = tmp_path_factory.mktemp("roomy")
    config = tiny.llama4_config() | {"max_position_embeddings": MILLION}
    source = tiny.write_checkpoint(root / "source", config)
    quantize_model(source, root / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    return root / "out"


def test_a_context_is_full_at_the_model_s_own_maximum(quantized: Path) -> None:
    with Engine.open(quantized, EngineConfig(ctx=MAXIMUM)) as engine:
        session, prompt = engine.new_session(), engine.encode_text("x" * (MAXIMUM - 12))
        sampling = SamplingConfig(0, ignore_eos=True)
        last = list(engine.generate(session, prompt, sampling))[-1]
        assert (last.reason, len(session.tokens)) == ("context", MAXIMUM)
        assert last.stats.generated_tokens == MAXIMUM - len(prompt) + 1


def test_one_more_is_refused_by_name(moecli: Command, quantized: Path) -> None:
    outcome = moecli("run", quantized, "hi", "--ctx", MAXIMUM + 1)
    assert outcome.code == 1
    assert f"longer than the model's own {MAXIMUM}" in outcome.err
    assert f"--ctx {MAXIMUM}" in outcome.err


def test_a_million_tokens_fit_where_the_plan_says_so(moecli: Command, roomy: Path) -> None:
    cache = MILLION * 2 * tiny.KV_HEADS * tiny.HEAD_DIM * 2
    with Engine.open(roomy, EngineConfig(ctx=MILLION)) as engine:
        assert cache < engine.plan.kv_nbytes < 1.001 * cache, "three layers keep one chunk"
    ran = moecli("run", roomy, "hi", "--ctx", "1m", "--ram", "160MiB", "-n", "4")
    assert ran.code == 0, ran.err
    small = moecli("run", roomy, "hi", "--ctx", "1m", "--ram", "100MiB")
    assert small.code == 1
    found = re.search(r"hint: a context of (\d+) tokens fits: `--ctx \1`", small.err)
    assert found is not None, small.err
    for ctx, code in ((int(found[1]), 0), (int(found[1]) + 100, 1)):
        args = ("hi", "--ctx", ctx, "--ram", "100MiB", "-n", "4")
        assert moecli("run", roomy, *args).code == code
