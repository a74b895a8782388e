"""What moecli writes is a checkpoint that transformers loads, with the logits moecli computes."""

from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig
from moecli.engine import Engine
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.moe import FloatExpert, FloatExperts
from moecli.models.naming import dense_loader
from quant.checkpoint import QuantizedCheckpoint
from quant.quantize import dequantize
from tests.e2e import tiny

TOLERANCE = 2e-5  # of fp32 logits of magnitude 1 to 10


@pytest.fixture(params=["quantized", "quantized_qwen3", "quantized_demo"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def rounded_to_bf16(engine: Engine) -> Decoder:
    """The same model with every quantized weight rounded to bf16, as the library loads it.

    Where the library fuses unfused experts (Qwen3-MoE), it expands them to bf16 first.
    """
    checkpoint = QuantizedCheckpoint.open(engine.path)

    def load(layer: int, expert: int) -> FloatExpert:
        path, offset, nbytes = checkpoint.expert_span(layer, expert)
        blob = torch.frombuffer(bytearray(path.read_bytes()[offset:][:nbytes]), dtype=torch.uint8)
        parts = checkpoint.layout.views(blob)
        gate, up, down = (
            dequantize(part, torch.bfloat16).float() for part in (parts.gate, parts.up, parts.down)
        )
        return gate, up, down

    weights = dense_loader(engine.spec, checkpoint.checkpoint.tensors, checkpoint.dense)
    return Decoder(engine.spec, weights, FloatExperts(engine.spec, load))


def test_transformers_computes_the_same_logits_from_the_same_files(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).float().eval()
    tokens = torch.randint(0, tiny.VOCAB - 8, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    for kernels in ("reference", "torch"):
        with Engine.open(model, EngineConfig(ctx=128, kernels=kernels)) as engine:
            cache = KvCache(engine.spec, 128, torch.float32)
            unfused = engine.spec.family == "qwen3_moe"
            decoder = rounded_to_bf16(engine) if unfused else engine.decoder
            found = decoder.forward(Batch.of(tokens, cache, all_logits=True))
        assert found.abs().max() > 1, "the logits are too small to compare"
        assert (found - expected).abs().max() < TOLERANCE, kernels
