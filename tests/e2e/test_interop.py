"""What moecli writes is a checkpoint that transformers loads, with the logits moecli computes."""

from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig
from moecli.engine import Engine
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from tests.e2e import tiny

TOLERANCE = 2e-5  # of fp32 logits of magnitude 1 to 10


@pytest.fixture(params=["quantized", "quantized_qwen3", "quantized_demo"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_transformers_computes_the_same_logits_from_the_same_files(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.randint(0, tiny.VOCAB - 8, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    for kernels in ("reference", "torch"):
        with Engine.open(model, EngineConfig(ctx=128, kernels=kernels)) as engine:
            cache = KvCache(engine.spec, 128, torch.float32)
            found = engine.decoder.forward(Batch.of(tokens, cache, all_logits=True))
        assert found.abs().max() > 1, "the logits are too small to compare"
        assert (found - expected).abs().max() < TOLERANCE, kernels
