"""What moecli writes is a checkpoint that transformers loads, with the logits moecli computes."""

import json
from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.moe import FloatExpert, FloatExperts
from moecli.models.naming import dense_loader
from quant.checkpoint import QuantizedCheckpoint
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from tests.commands import Command
from tests.e2e import tiny

TOLERANCE = 3e-6  # of the largest logit, in fp32

SCHEMES = {  # experts, dense linears; beside the default of the fixtures
    "int8": (QuantScheme(8, 32), QuantScheme(8, 32)),
    "int4_everywhere": (QuantScheme(4, 32), QuantScheme(4, 32)),
    "dense_16_bits": (QuantScheme(4, 32), None),
}


@pytest.fixture(params=["quantized", "quantized_qwen3", "quantized_demo"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def write_source(root: Path, family: str, tied: bool = False) -> Path:
    config, tensors = tiny.llama4_config(), tiny.llama4_tensors()
    if family == "qwen3_moe":
        config, tensors = tiny.qwen3_config(), tiny.qwen3_tensors()
    if tied:
        config["tie_word_embeddings"] = True
        del tensors["lm_head.weight"]
    return tiny.write_checkpoint(root / "source", config, tensors)


def write(root: Path, family: str, scheme: str, tied: bool = False) -> Path:
    source = write_source(root, family, tied)
    quantize_model(source, root / "out", *SCHEMES[scheme])
    return root / "out"


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
    compare_with_transformers(model)


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_so_it_does_whatever_the_scheme(tmp_path: Path, family: str, scheme: str) -> None:
    compare_with_transformers(write(tmp_path, family, scheme))


@pytest.mark.parametrize("family", ["llama4", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["int8", "dense_16_bits"])
def test_so_it_does_with_tied_embeddings(tmp_path: Path, family: str, scheme: str) -> None:
    compare_with_transformers(write(tmp_path, family, scheme, tied=True))


@pytest.mark.parametrize(("family", "rest"), [("llama4", "int8-g32"), ("qwen3_moe", "int8-g64")])
def test_groups_are_narrowed_aloud_as_planned_and_read_so(
    moecli: Command, tmp_path: Path, family: str, rest: str
) -> None:
    """Rows of 64 and 32 weights, where INT8 usually has groups of 128."""
    source, out = write_source(tmp_path, family), tmp_path / "out"
    refused = moecli("quantize", source, "-o", out, "--dense", "int8-g128")
    assert refused.code == 1
    assert "groups of 128" in refused.err
    assert "`--dense int8-g32`" in refused.err
    outcome = moecli("quantize", source, "-o", out, "-q", "int8")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.err.split())
    assert "experts take int8-g32: rows of 32 weights do not divide into groups of 128" in said
    assert f"other linears take {rest}: rows of" in said
    plan = json.loads(moecli("plan", source, "-q", "int8", "--json").out)
    schemes = (plan["scheme"], plan["dense_scheme"])
    written = QuantizedCheckpoint.open(out)
    assert written.dense_scheme is not None
    assert schemes == (written.scheme.name, written.dense_scheme.name) == ("int8-g32", rest)
    compare_with_transformers(out)


def compare_with_transformers(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for parameter in theirs.parameters():  # fused experts stay bf16 whatever is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    tokens = torch.randint(0, tiny.VOCAB - 8, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    for kernels in ("reference", "torch"):
        with Engine.open(model, EngineConfig(ctx=128, kernels=kernels)) as engine:
            cache = KvCache(engine.spec, 128, torch.float32)
            unfused = engine.spec.family == "qwen3_moe"
            decoder = rounded_to_bf16(engine) if unfused else engine.decoder
            found = decoder.forward(Batch.of(tokens, cache, all_logits=True))
        largest = found.abs().max()
        assert largest > 1, "the logits are too small to compare"
        assert (found - expected).abs().max() < TOLERANCE * largest, kernels
