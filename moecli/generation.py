"""Knows how a prompt becomes a stream of events: prefill, decode, stops, cancellation, numbers."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.events import Event, Finished, FinishReason, GenerationStats, PrefillProgress, TextDelta
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.sampler import new_generator, sample
from moecli.session import Session
from moecli.stopping import StopFilter
from moecli.tokenizer import Tokenizer
from offload.manager import ExpertManager

Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Runtime:
    """What generating needs: the parts, the most tokens a sequence may have, tokens a chunk."""

    decoder: Decoder
    tokenizer: Tokenizer
    manager: ExpertManager
    ctx: int
    prefill_chunk: int


def generate(
    runtime: Runtime,
    session: Session,
    token_ids: list[int],
    sampling: SamplingConfig,
    cancelled: Cancelled,
) -> Iterator[Event]:
    """Events for the whole context `token_ids`; the last is always Finished.

    Only what `session` does not hold yet is processed. `cancelled` is asked between chunks of the
    prompt and between tokens, never inside a step.
    """
    assert 0 < len(token_ids) < runtime.ctx, "the engine checks the length of a prompt"
    meter = _Meter(runtime.manager)
    cached = session.rewind(token_ids)
    answer = _Answer(runtime.tokenizer, sampling)
    reason: FinishReason | None = None
    logits: Tensor | None = None  # [V]
    while reason is None and len(session.tokens) < len(token_ids):
        chunk = token_ids[len(session.tokens) :][: runtime.prefill_chunk]
        logits = _forward(runtime, session, chunk)
        yield PrefillProgress(len(session.tokens) - cached, len(token_ids) - cached)
        reason = "cancelled" if cancelled() else None
    computed = len(session.tokens) - cached
    generator = new_generator(sampling.seed)
    while reason is None:
        assert logits is not None
        token = sample(logits, sampling, generator)
        meter.token()
        if token in runtime.tokenizer.eos_ids:
            reason = "stop"
            break
        if delta := answer.add(token):
            yield TextDelta(delta)
        reason = _why_stop(runtime, session, answer, sampling, cancelled)
        if reason is None:
            logits = _forward(runtime, session, [token])
    if delta := answer.end():
        yield TextDelta(delta)
    stats = meter.stats(len(token_ids), cached, computed, answer.num_tokens)
    yield Finished(reason, answer.text, stats)


def peak_rss_nbytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forward(runtime: Runtime, session: Session, tokens: list[int]) -> Tensor:
    """Logits [V] after `tokens`, which the session then holds."""
    runtime.manager.begin_step()
    logits = runtime.decoder.forward(Batch.of(torch.tensor(tokens), session.cache))  # [1, V]
    session.tokens.extend(tokens)
    return logits[0]


def _why_stop(
    runtime: Runtime,
    session: Session,
    answer: "_Answer",
    sampling: SamplingConfig,
    cancelled: Cancelled,
) -> FinishReason | None:
    if answer.stopped:
        return "stop"
    if answer.num_tokens == sampling.max_tokens:
        return "length"
    if len(session.tokens) >= runtime.ctx:
        return "context"
    return "cancelled" if cancelled() else None


class _Answer:
    """The text of one answer as it becomes certain."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopFilter(sampling.stop)
        self.text = ""
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def add(self, token: int) -> str:
        self.num_tokens += 1
        return self._append(self._stops.feed(self._detokenizer.add(token)))

    def end(self) -> str:
        return self._append(self._stops.feed(self._detokenizer.finish()) + self._stops.flush())

    def _append(self, delta: str) -> str:
        self.text += delta
        return delta


class _Meter:
    """Times one generation and counts what its experts cost."""

    def __init__(self, manager: ExpertManager) -> None:
        self._manager = manager
        self._before = manager.stats
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started
        self._sampled = 0

    def token(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._sampled += 1

    def stats(self, prompt: int, cached: int, computed: int, generated: int) -> GenerationStats:
        cache = self._manager.stats - self._before
        ttft = (self._first or time.perf_counter()) - self._started
        decode = self._last - (self._first or self._last)
        return GenerationStats(
            prompt_tokens=prompt,
            cached_tokens=cached,
            generated_tokens=generated,
            ttft_s=ttft,
            prefill_tok_s=computed / ttft,
            decode_tok_s=(self._sampled - 1) / decode if decode else 0.0,
            expert_hits=cache.hits,
            expert_misses=cache.misses,
            expert_nbytes_read=cache.disk_nbytes,
            peak_rss_nbytes=peak_rss_nbytes(),
        )
