"""Every family the whole way: saved by transformers, quantized, run, against the dequantized model.

The engine keeps keys and values in bf16: where two tokens are as likely, it may take the other one.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecli.config import SIMULATED, EngineConfig, SamplingConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from quant.scheme import QuantScheme
from tests.commands import Command
from tests.e2e.conftest import saved_family
from tests.models.dequantized import dequantized
from tests.models.families import BORDER, FAMILIES
from tests.models.tiny_models import expected_logits

PROMPT = "a prompt of more than one window"  # 32 tokens: one a byte
NUM_TOKENS = 24
AS_LIKELY = 0.1  # logits, of a magnitude of 1 to 10, that rounding to bf16 can turn around
assert len(PROMPT) > BORDER


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_quantized_and_run_it_answers_as_the_dequantized_model(
    moecli: Command, tmp_path: Path, family: str
) -> None:
    source, out = saved_family(tmp_path / "source", family), tmp_path / "out"
    assert moecli("quantize", source, "-o", out).code == 0
    assert FAMILIES[family].model in moecli("show", out).out
    library = dequantized(out)
    with Engine.open(out, EngineConfig(ctx=128, kernels="reference")) as engine:
        prompt = engine.encode_text(PROMPT)
        session, sampling = engine.new_session(), SamplingConfig(0, max_tokens=NUM_TOKENS)
        list(engine.generate(session, prompt, sampling))
        text = engine.tokenizer.decode(session.tokens[len(prompt) :])
    found = session.tokens[len(prompt) :]
    logits = expected_logits(library, torch.tensor(session.tokens))[len(prompt) - 1 : -1]
    behind = logits.amax(-1) - logits.gather(-1, torch.tensor(found)[:, None])[:, 0]
    assert len(found) == NUM_TOKENS - 1
    assert behind.max() < AS_LIKELY
    assert (behind == 0).float().mean() > 0.7
    ran = moecli(
        "run", out, PROMPT, "--raw", "--temp", "0", "-n", NUM_TOKENS, "--kernels", "reference"
    )
    assert ran.code == 0, ran.err
    assert ran.out.startswith(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_device_it_answers_the_same(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device made of main memory, all experts in its VRAM; others: tests/e2e/test_lanes.py."""
    source = saved_family(tmp_path / "source", family)
    quantize_model(source, tmp_path / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    # Rounded to bf16, the last bits of keys and values would turn some answers around.
    for module in ("engine", "opening_device"):
        monkeypatch.setattr(f"moecli.{module}.KV_DTYPE", torch.float32)
    config = EngineConfig(ctx=128, kernels="reference")
    device = replace(config, device=SIMULATED, vram_nbytes=1 << 30, ram_nbytes=1 << 30)
    answers = []
    for settings in (config, device):
        with Engine.open(tmp_path / "out", settings) as engine:
            session, prompt = engine.new_session(), engine.encode_text(PROMPT)
            list(engine.generate(session, prompt, SamplingConfig(0, max_tokens=NUM_TOKENS)))
            answers.append(list(session.tokens))
    assert answers[0] == answers[1]
