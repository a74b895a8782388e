"""The answer does not depend on where the experts lie, and memory stays within the plan."""

from pathlib import Path

import pytest
import torch

from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.events import Finished, GenerationStats
from moecli.models.batch import Batch
from offload.lease import Lease
from offload.stream import Stream
from quant.ops import fallback
from tests.e2e import tiny

PROMPT = "Tell me a story about a fox, please. " * 3


def budget_for(path: Path, share: float, **settings: int) -> int:
    """Bytes of RAM that hold `share` of the experts, and at least one token's."""
    with Engine.open(path, EngineConfig(**settings)) as engine:
        plan, least = engine.plan, engine.spec.experts_per_token
        fixed = plan.ram_nbytes - plan.host_slots * plan.slot_nbytes
        return fixed + max(least, int(share * plan.total_experts)) * plan.slot_nbytes


def greedy(
    path: Path, config: EngineConfig, num_tokens: int = 24
) -> tuple[str, list[int], GenerationStats]:
    """Answer, tokens and numbers; the bookkeeping is checked after every event."""
    with Engine.open(path, config) as engine:
        session = engine.new_session()
        prompt = engine.encode_chat([{"role": "user", "content": PROMPT}])
        sampling = SamplingConfig(temperature=0, max_tokens=num_tokens)
        last = None
        for event in engine.generate(session, prompt, sampling):
            engine.check_integrity()
            last = event
        engine.check_integrity(deep=True)
        assert isinstance(last, Finished)
        return last.text, list(session.tokens), last.stats


@pytest.fixture(scope="session", params=["tiny", "tiny-qwen3", "demo"])
def model(request: pytest.FixtureRequest) -> Path:
    name = {"tiny": "quantized", "tiny-qwen3": "quantized_qwen3", "demo": "quantized_demo"}
    return request.getfixturevalue(name[request.param])


def test_greedy_output_is_the_same_wherever_experts_lie(model: Path) -> None:
    everything = greedy(model, EngineConfig(ctx=256))
    for share in (0.1, 0.25, 0.5):
        config = EngineConfig(ctx=256, ram_nbytes=budget_for(model, share, ctx=256))
        text, tokens, stats = greedy(model, config)
        assert (text, tokens) == everything[:2], f"{share:.0%} of the experts resident"
        assert stats.expert_nbytes_read > everything[2].expert_nbytes_read, "nothing was evicted"
    text, tokens, stats = greedy(model, EngineConfig(ctx=256, keep_experts=False))
    assert (text, tokens) == everything[:2], "every expert read from disk"
    assert stats.hit_rate == 0


@pytest.mark.parametrize("kernels", ["reference", "torch", "cpu"])
def test_logits_are_bitwise_the_same_wherever_experts_lie(model: Path, kernels: str) -> None:
    """Of a prompt, of single tokens, and of a few at once."""
    if kernels == "cpu" and fallback() is not None:
        pytest.skip("there is no compiler here")

    def logits(config: EngineConfig) -> torch.Tensor:
        with Engine.open(model, config) as engine:
            cache, found = engine.new_session().cache, []
            for piece in torch.arange(100, 160).split([50, 1, 1, 5, 1, 2]):
                batch = Batch.of(piece, cache, all_logits=True)
                found.append(engine.decoder.forward(batch))
            return torch.cat(found)

    budget = budget_for(model, 0.1, ctx=256)
    everything = logits(EngineConfig(ctx=256, kernels=kernels))
    little = logits(EngineConfig(ctx=256, kernels=kernels, ram_nbytes=budget))
    nothing = logits(EngineConfig(ctx=256, kernels=kernels, keep_experts=False))
    assert torch.isfinite(everything).all()
    assert torch.equal(everything, little)
    assert torch.equal(everything, nothing)


def test_an_expert_in_the_wrong_slot_shows(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above has teeth: swapping two experts' addresses changes the answer."""
    right = greedy(quantized, EngineConfig(ctx=256))
    following = Stream.__next__

    def swapped(self: Stream) -> Lease:
        lease = following(self)
        places = list(lease.addresses.values())
        lease.addresses = dict(zip(lease.addresses, places[1:] + places[:1], strict=True))
        return lease

    monkeypatch.setattr(Stream, "__next__", swapped)
    assert greedy(quantized, EngineConfig(ctx=256))[1] != right[1]


def test_the_tiny_models_have_more_experts_than_a_tenth_holds() -> None:
    assert tiny.EXPERTS * tiny.LAYERS >= 10
