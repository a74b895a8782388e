"""The stream of events: turns that share a KV cache, reasons to stop, cancellation, failures."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moecli.beside import beside
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.events import Finished, PrefillProgress, TextDelta
from moecli.session import Session
from offload.disk import DiskTier
from offload.errors import OffloadError
from tests.e2e import tiny

GREEDY = SamplingConfig(temperature=0, max_tokens=12)
LONG = "a prompt that crosses the border of several chunks of attention. "


@pytest.fixture
def engine(quantized: Path) -> Iterator[Engine]:
    """By the plain kernels: 8-bit codes of activations make other tokens of sums in another order.

    Opened for each test, as the kernels are the process's own.
    """
    with Engine.open(quantized, EngineConfig(256, prefill_chunk=20, kernels="reference")) as opened:
        yield opened


def finish(
    engine: Engine, session: Session, tokens: list[int], sampling: SamplingConfig = GREEDY
) -> Finished:
    events = list(engine.generate(session, tokens, sampling))
    last = events[-1]
    assert isinstance(last, Finished)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == last.text
    assert len(session.tokens) == session.cache.length
    return last


def chat(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_second_turn_computes_only_what_is_new_and_answers_as_if_all_were(
    engine: Engine,
) -> None:
    session = engine.new_session()
    first = finish(engine, session, engine.encode_chat(chat(LONG), session))
    held = list(session.tokens)
    messages = chat(LONG, first.text, "and then?")
    tokens = engine.encode_chat(messages, session)
    assert tokens[: len(held)] == held, "what is in the cache was divided into other tokens"
    second = finish(engine, session, tokens)
    assert second.stats.cached_tokens == len(held)
    assert second.text == finish(engine, engine.new_session(), tokens).text


@pytest.mark.parametrize("kept", [10, 70, 100])
def test_a_changed_history_is_computed_again_from_where_it_changed(
    engine: Engine, kept: int
) -> None:
    session = engine.new_session()
    tokens = engine.encode_text(LONG * 2)
    finish(engine, session, tokens)
    changed = tokens[:kept] + engine.encode_text("something else altogether, not the same")
    again = finish(engine, session, changed)
    assert again.stats.cached_tokens <= kept
    assert again.text == finish(engine, engine.new_session(), changed).text


def test_the_same_prompt_again_computes_one_token(engine: Engine) -> None:
    session = engine.new_session()
    tokens = engine.encode_text("short")
    first = finish(engine, session, tokens)
    again = finish(engine, session, tokens)
    assert again.stats.cached_tokens == len(tokens) - 1
    assert again.text == first.text


def test_progress_counts_new_tokens_chunk_by_chunk(engine: Engine) -> None:
    tokens = engine.encode_text("x" * 49)
    events = engine.generate(engine.new_session(), tokens, GREEDY)
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    total = len(tokens)
    assert progress == [PrefillProgress(min(n, total), total) for n in (0, 20, 40, 60)]


def test_cancelling_keeps_what_was_written_and_the_session_goes_on(engine: Engine) -> None:
    session, tokens = engine.new_session(), engine.encode_text(LONG)
    whole = finish(engine, engine.new_session(), tokens)
    asked = iter([False] * 9 + [True])  # five chunks of prompt, four tokens, then Ctrl-C
    events = list(engine.generate(session, tokens, GREEDY, lambda: next(asked)))
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "cancelled"
    assert 0 < len(last.text) < len(whole.text)
    assert whole.text.startswith(last.text.rstrip("\ufffd"))
    assert finish(engine, session, tokens).text == whole.text


def test_cancelling_in_the_prompt_keeps_whole_chunks(engine: Engine) -> None:
    session, tokens = engine.new_session(), engine.encode_text(LONG)
    last = list(engine.generate(session, tokens, GREEDY, lambda: True))[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.text, len(session.tokens)) == ("cancelled", "", 20)
    assert last.stats.prefill_tok_s * last.stats.ttft_s == pytest.approx(20)
    again = finish(engine, session, tokens)
    assert again.stats.cached_tokens == 20
    assert again.text == finish(engine, engine.new_session(), tokens).text


def test_reasons_to_stop(engine: Engine) -> None:
    tokens = engine.encode_text(LONG)
    whole = finish(engine, engine.new_session(), tokens)
    assert whole.reason == "length"
    assert whole.stats.generated_tokens == 12
    stop = whole.text[3:5]
    cut = SamplingConfig(temperature=0, max_tokens=12, stop=(stop,))
    stopped = finish(engine, engine.new_session(), tokens, cut)
    assert stopped.reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    full = finish(
        engine, engine.new_session(), engine.encode_text("y" * 250), SamplingConfig(temperature=0)
    )
    assert full.reason == "context"


def test_a_seed_repeats_the_answer_and_another_changes_it(engine: Engine) -> None:
    def answer(seed: int) -> str:
        sampling = SamplingConfig(temperature=1.5, max_tokens=20, seed=seed)
        return finish(engine, engine.new_session(), engine.encode_text(LONG), sampling).text

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_read_that_fails_costs_the_answer_and_nothing_else(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(ctx=256, prefill_chunk=20, keep_experts=False)
    with Engine.open(quantized, config) as engine:
        session, tokens = engine.new_session(), engine.encode_text(LONG)
        whole = finish(engine, engine.new_session(), tokens)
        read, countdown = DiskTier.read_into, iter(range(60))
        first_chunk = tiny.EXPERTS * tiny.LAYERS  # reads at most; the second crosses a border

        def failing(self: DiskTier, key: tuple[int, int], buffer: memoryview) -> int:
            if next(countdown) == first_chunk + 6:
                raise OffloadError("`model.safetensors` cannot be read", "try again")
            return read(self, key, buffer)

        monkeypatch.setattr(DiskTier, "read_into", failing)
        with pytest.raises(OffloadError):
            finish(engine, session, tokens)
        engine.check_integrity()
        assert session.cache.length < len(session.tokens), "no step died across a border"
        monkeypatch.undo()
        assert finish(engine, session, tokens).text == whole.text
        engine.check_integrity(deep=True)


def test_too_long_and_empty_prompts_are_refused_before_anything_happens(engine: Engine) -> None:
    session = engine.new_session()
    for tokens, words in (([], "empty"), ([1] * 256, "256")):
        with pytest.raises(MoecliError, match=words):
            engine.generate(session, tokens, GREEDY)
    assert session.tokens == []


def test_what_decoding_costs_is_counted_apart_from_the_prompt(engine: Engine) -> None:
    """One expert a layer and step; what is read of RAM is what the plan says."""
    tokens = engine.encode_text(LONG)
    stats = finish(engine, engine.new_session(), tokens).stats
    assert stats.decode_steps == 11
    assert stats.decoded.requests == 11 * tiny.LAYERS
    assert stats.expert_hits + stats.expert_misses > stats.decoded.requests
    found = beside(engine.plan, stats)
    assert found.a_token["ram"].measured == found.a_token["ram"].planned
    assert found.hit_rate.measured == stats.decoded.hit_rate
    assert found.ram_nbytes.measured is not None
