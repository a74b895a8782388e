"""Families that the library computes with our experts, the whole way, against the library."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecli.config import EngineConfig, SamplingConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.events import Finished
from moecli.models import facts
from moecli.models.batch import Batch
from moecli.prompt import Prompt
from quant.checkpoint import QuantizedCheckpoint
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from tests.models import library_families as families

INT4 = QuantScheme(4, 32)
PIECES = (5, 12, 1, 1, 5)
TOLERANCE = 1e-5  # of fp32 logits of magnitude 2
RECURRENT_TOLERANCE = 5e-5  # the library has two forms of a recurrent layer: for prompts, for steps


@pytest.fixture(autouse=True)
def nothing_is_our_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families of our own decoder take the library's way too, and quietly."""
    import transformers

    monkeypatch.setattr(facts, "is_known", lambda config: False)
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity(before)


def quantized(model: nn.Module, directory: Path, dense: QuantScheme | None = None) -> Path:
    source = families.save(model, directory / "source")
    quantize_model(source, directory / "out", INT4, dense)
    return directory / "out"


def with_written_experts(model: Any, path: Path) -> Any:
    """The library's model with the experts that moecli has written, in floats again."""
    checkpoint = QuantizedCheckpoint.open(path)
    for name, module in families.experts_modules(model):
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        for expert in range(checkpoint.num_experts(layer)):
            file, offset, nbytes = checkpoint.expert_span(layer, expert)
            blob = torch.from_file(str(file), size=offset + nbytes, dtype=torch.uint8)[offset:]
            weights = checkpoint.layout.views(blob.clone())
            up = torch.cat([dequantize(weights.gate), dequantize(weights.up)])
            down = dequantize(weights.down)
            if module.is_transposed:
                up, down = up.t(), down.t()
            module.gate_up_proj.data[expert], module.down_proj.data[expert] = up, down
    return model


@torch.no_grad()
def expected(model: Any, token_ids: Tensor) -> Tensor:
    """Logits [T, V] of the library's forward over the whole sequence, without a cache."""
    return model(token_ids[None], use_cache=False).logits[0]


def some_tokens(count: int, seed: int = 3) -> Tensor:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed))


def in_pieces(engine: Engine, token_ids: Tensor, pieces: tuple[int, ...]) -> tuple[Tensor, int]:
    """Logits [T, V], and the bytes that the sequence's cache holds."""
    cache: Any = engine.new_session().cache
    found = [
        engine.decoder.forward(Batch.of(piece, cache, all_logits=True))
        for piece in token_ids.split(list(pieces))
    ]
    return torch.cat(found), cache.nbytes


def greedy(engine: Engine, prompt: Tensor, count: int) -> list[int]:
    """The tokens that follow a prompt."""
    session = engine.new_session()
    sampling = SamplingConfig(temperature=0, max_tokens=count, ignore_eos=True)
    for event in engine.generate(session, prompt.tolist(), sampling):
        if isinstance(event, Finished):
            assert event.stats.generated_tokens == count
    return session.tokens[len(prompt) :]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_computes_as_the_library_does(family: str, tmp_path: Path) -> None:
    """Logits of a prompt and of steps after it, an answer, what is kept, and what is counted."""
    model = families.tiny_model(family)
    path = quantized(model, tmp_path)
    with_written_experts(model, path)
    token_ids = some_tokens(sum(PIECES))
    want = expected(model, token_ids)
    with Engine.open(path, EngineConfig(kernels="reference", ctx=64, device="cpu")) as engine:
        found, kept = in_pieces(engine, token_ids, PIECES)
        assert engine.spec.recurrent == (family in families.RECURRENT)
        tolerance = RECURRENT_TOLERANCE if engine.spec.recurrent else TOLERANCE
        torch.testing.assert_close(found, want, atol=tolerance, rtol=0)
        answer = greedy(engine, token_ids, 4)
        whole = torch.cat([token_ids, torch.tensor(answer)])
        assert expected(model, whole)[len(token_ids) - 1 : -1].argmax(-1).tolist()[:3] == answer[:3]
        assert kept <= engine.plan.kv_nbytes
        assert engine.spec.num_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "aria_text", "lfm2_moe"])
def test_dense_linears_are_quantized_where_the_library_takes_them_as_they_are(
    family: str, tmp_path: Path
) -> None:
    """The oracle reads a checkpoint of the source's names, whose values were quantized before."""
    model = families.tiny_model(family, hidden_size=128)
    path = quantized(model, tmp_path, QuantScheme(8, 128))
    checkpoint = QuantizedCheckpoint.open(path)
    packed = [name for name in checkpoint.checkpoint.tensors if name.endswith(".weight_packed")]
    dense = [name.removesuffix("_packed") for name in packed if ".experts." not in name]
    assert {name.split(".")[-2] for name in dense} & {"q_proj", "q_a_proj"}
    with_written_experts(model, path)
    with torch.no_grad():
        for name in dense:  # these families have the source's names
            weight: Any = checkpoint.dense(name)
            model.get_parameter(name).copy_(dequantize(weight))
    token_ids = some_tokens(sum(PIECES))
    with Engine.open(path, EngineConfig(kernels="reference", ctx=64, device="cpu")) as engine:
        found, _ = in_pieces(engine, token_ids, PIECES)
    torch.testing.assert_close(found, expected(model, token_ids), atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=["olmoe", "mimo_v2_flash", "qwen3_next"])
def family_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of full layers, of sliding ones, and of recurrent ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "is_known", lambda config: False)
        model = families.tiny_model(request.param)
        return quantized(model, tmp_path_factory.mktemp(request.param))


def open_engine(path: Path, **settings: Any) -> Engine:
    return Engine.open(path, EngineConfig(kernels="reference", ctx=64, device="cpu", **settings))


def test_a_conversation_goes_on_from_what_its_cache_holds(family_path: Path) -> None:
    """And answers as a new one does, however much of the prompt was there before."""
    prompt = some_tokens(12)
    longer = torch.cat([prompt[:9], some_tokens(6, seed=4)])
    with open_engine(family_path) as engine:
        session = engine.new_session()
        sampling = SamplingConfig(temperature=0, max_tokens=3, ignore_eos=True)
        for token_ids in (prompt, longer):
            list(engine.generate(session, token_ids.tolist(), sampling))
            assert session.tokens[len(token_ids) :] == greedy(engine, token_ids, 3)[:2]


def test_sequences_of_different_lengths_step_together_as_alone(family_path: Path) -> None:
    texts = [some_tokens(count, seed).tolist() for seed, count in ((5, 3), (6, 11), (7, 1))]
    with open_engine(family_path) as engine:
        alone = [engine.step([engine.new_session()], [text])[0] for text in texts]
        together = engine.step([engine.new_session() for _ in texts], texts)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=0)


def test_after_a_failed_step_the_sequence_is_computed_anew(family_path: Path) -> None:
    prompt = some_tokens(12).tolist()
    with open_engine(family_path) as engine:
        want = engine.step([engine.new_session()], [prompt])
        session = engine.new_session()
        engine.step([session], [prompt[:5]])
        # A layer is broken on purpose, which only the library's own module allows.
        model: Any = engine.decoder._model  # type: ignore[attr-defined]
        layers = model.get_decoder().layers
        norm, layers[-1].input_layernorm = layers[-1].input_layernorm, None
        with pytest.raises(TypeError):
            engine.step([session], [prompt[5:]])
        layers[-1].input_layernorm = norm
        assert session.rewind(Prompt(prompt)) == 0
        torch.testing.assert_close(engine.step([session], [prompt]), want)


def test_experts_do_not_have_to_be_in_memory(family_path: Path) -> None:
    """Greedy answers do not depend on how many of them are."""
    prompt = some_tokens(12)
    with open_engine(family_path) as engine:
        want = greedy(engine, prompt, 5)
        least = engine.plan.ram_nbytes - engine.plan.host_arena_nbytes
        slot = engine.plan.slot_nbytes
    with open_engine(family_path, ram_nbytes=least + 9 * slot) as engine:
        assert engine.plan.host_arena_nbytes < 10 * slot
        assert greedy(engine, prompt, 5) == want
        assert engine.expert_stats().disk_nbytes > 10 * slot


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "on the processor alone"),
        ({"vram_nbytes": 1 << 30}, "on the processor alone"),
        ({"kv_dtype": "int8"}, "KV cache is in fp32"),
        ({"dense_scheme": "nf4"}, "stay as they are stored"),
    ],
)
def test_what_the_library_cannot_be_asked_for_is_said(
    family_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MoecliError, match=message):
        Engine.open(family_path, EngineConfig(ctx=64, **settings))


CHILD = """
import json, sys
from pathlib import Path
import transformers.models.olmoe.modeling_olmoe, accelerate
import moecli.engine, moecli.models.hf.model
from moecli.config import EngineConfig, SamplingConfig
from offload.hardware import peak_rss_nbytes
path, budget = Path(sys.argv[1]), int(sys.argv[2])
config = EngineConfig(ctx=128, ram_nbytes=budget, threads=1, device="cpu")
before = peak_rss_nbytes()
with moecli.engine.Engine.open(path, config) as engine:
    prompt = engine.encode_text(bytes(range(33, 127)).decode())
    sampling = SamplingConfig(temperature=1, seed=0, max_tokens=16, ignore_eos=True)
    list(engine.generate(engine.new_session(), prompt, sampling))
    read, plan = engine.expert_stats().disk_nbytes, engine.plan.to_dict()
print(json.dumps({"grown": peak_rss_nbytes() - before, "read": read, "plan": plan}))
"""


def test_no_experts_are_ever_in_memory_in_floats(tmp_path: Path) -> None:
    """Those of one layer would take 48 MiB in fp32, and 190 MiB those of all."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 128}
    sizes |= {"num_experts": 128, "num_local_experts": 128}  # two names of one number
    sizes |= {"num_experts_per_tok": 8}
    path = quantized(families.tiny_model("olmoe", **sizes), tmp_path)
    budget = 12 << 20
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(budget)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    found = json.loads(done.stdout)
    assert found["plan"]["ram_nbytes"] <= budget
    assert found["read"] > budget, "more was read than the budget holds"
    assert found["grown"] <= budget + (32 << 20)
