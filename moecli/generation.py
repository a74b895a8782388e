"""Knows how a prompt becomes a stream of events: prefill, stops, cancellation, numbers.

How one token follows another is the runtime's: see `Stepwise` and moecli.decode_loop.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.events import (
    Event,
    Finished,
    FinishReason,
    GenerationStats,
    Looking,
    PrefillProgress,
    TextDelta,
)
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch, Patches, SequenceSlice
from moecli.models.text_decoder import TextDecoder
from moecli.prompt import Placed, Prompt
from moecli.session import Session
from moecli.stopping import StopFilter
from moecli.tokenizer import Tokenizer
from moecli.vision.eye import Eye
from offload.hardware import peak_rss_nbytes
from offload.stats import CacheStats

Cancelled = Callable[[], bool]
# The tokens after what a session holds, whose last logits [V] are given. The session holds a token
# when the one after it is asked for.
TokenSource = Callable[[Session, Tensor, SamplingConfig], Generator[int, None, None]]


@dataclass(frozen=True)
class Runtime:
    """What generating needs: the parts, the most tokens a sequence may have, tokens a chunk."""

    decoder: TextDecoder
    tokenizer: Tokenizer
    tokens: TokenSource
    stats: Callable[[], CacheStats]
    peak_vram: Callable[[], int | None]  # bytes
    begin_step: Callable[[], None]  # called before a chunk of the prompt
    ctx: int
    prefill_chunk: int
    eye: Eye | None  # of a model that sees pictures
    rss_before: int  # bytes this process had taken before the model was opened


def generate(
    runtime: Runtime,
    session: Session,
    prompt: Prompt,
    sampling: SamplingConfig,
    cancelled: Cancelled,
) -> Iterator[Event]:
    """Events for the whole context `prompt`; the last is always Finished.

    Only what `session` does not hold yet is processed. `cancelled` is asked between chunks of the
    prompt, between parts of the tower that looks at a picture and between tokens, never inside a
    step.
    """
    token_ids = prompt.token_ids
    assert 0 < len(token_ids) < runtime.ctx, "the engine checks the length of a prompt"
    meter = _Meter(runtime.stats)
    cached = session.rewind(prompt)
    answer = _Answer(runtime.tokenizer, sampling)
    logits = yield from _prefill(runtime, session, prompt, meter, cancelled)
    reason: FinishReason | None = "cancelled" if logits is None else None
    computed = len(session.tokens) - cached
    if logits is not None:
        session.cache.remember()
        with closing(runtime.tokens(session, logits, sampling)) as tokens:
            for token in tokens:
                meter.token()
                if token in runtime.tokenizer.eos_ids and not sampling.ignore_eos:
                    reason = "stop"
                elif delta := answer.add(token):
                    yield TextDelta(delta)
                reason = reason or _why_stop(runtime, session, answer, sampling, cancelled)
                if reason is not None:
                    break
    assert reason is not None, "the tokens ended by themselves"
    if delta := answer.end():
        yield TextDelta(delta)
    stats = meter.stats(len(token_ids), cached, computed, answer.num_tokens)
    image_tokens = sum(len(placed.positions) for placed in prompt.pictures)
    stats = replace(
        stats,
        peak_vram_nbytes=runtime.peak_vram(),
        image_tokens=image_tokens,
        grown_rss_nbytes=stats.peak_rss_nbytes - runtime.rss_before,
    )
    yield Finished(reason, answer.text, stats)


def _prefill(
    runtime: Runtime, session: Session, prompt: Prompt, meter: "_Meter", cancelled: Cancelled
) -> Generator[Event, None, Tensor | None]:
    """Feed what the session lacks of the prompt; its last logits [V], or None where cancelled."""
    cached, total = len(session.tokens), len(prompt.token_ids)
    logits: Tensor | None = None
    if total - cached > runtime.prefill_chunk:  # the first chunk alone may take a while
        yield PrefillProgress(0, total - cached)
    while len(session.tokens) < total:
        begin = len(session.tokens)
        chunk = prompt.token_ids[begin:][: runtime.prefill_chunk]
        if (placed := prompt.within(begin, begin + len(chunk))) and not (
            yield from _look(runtime, prompt, placed, meter, cancelled)
        ):
            return None
        runtime.begin_step()
        logits = _forward_chunk(runtime, session, chunk, placed)
        yield PrefillProgress(len(session.tokens) - cached, total - cached)
        if cancelled():
            return None
    if runtime.eye is not None:
        runtime.eye.keep([])
    return logits


def _look(
    runtime: Runtime,
    prompt: Prompt,
    placed: list[Placed],
    meter: "_Meter",
    cancelled: Cancelled,
) -> Generator[Event, None, bool]:
    """Have the embeddings of these pictures, and of no others, ready; False where cancelled."""
    eye = runtime.eye
    assert eye is not None, "a picture for a model that sees none"
    eye.keep(placed)
    for one in placed:
        if eye.has_seen(one):
            continue
        yield Looking(prompt.pictures.index(one) + 1, len(prompt.pictures))
        with meter.looking():
            if not eye.see(one, cancelled):
                return False
    return True


def _forward_chunk(
    runtime: Runtime, session: Session, chunk: list[int], placed: list[Placed]
) -> Tensor:
    """Logits [V] after a chunk of a prompt, in which these pictures lie."""
    if runtime.eye is None:
        return forward(runtime.decoder, session, chunk)
    begin = len(session.tokens)
    patches = runtime.eye.patches(placed, begin, begin + len(chunk)) if placed else None
    with runtime.eye.counting(len(chunk), patches):
        return forward(runtime.decoder, session, chunk, patches)


def forward(
    decoder: TextDecoder, session: Session, tokens: list[int], patches: Patches | None = None
) -> Tensor:
    """Logits [V] after `tokens`, which the session then holds."""
    return forward_together(decoder, [session], [tokens], patches)[0]


def forward_together(
    decoder: TextDecoder,
    sessions: Sequence[Session],
    tokens: Sequence[list[int]],
    patches: Patches | None = None,
) -> Tensor:
    """Logits [S, V] after the next tokens of each session, which it then holds."""
    slices = tuple(
        SequenceSlice(cast(KvCache, session.cache), session.cache.length, len(new))
        for session, new in zip(sessions, tokens, strict=True)
    )
    token_ids = torch.tensor([token for new in tokens for token in new], device=decoder.device)
    logits = decoder.forward(Batch(token_ids, slices, patches=patches))
    for session, new in zip(sessions, tokens, strict=True):
        session.tokens.extend(new)
    return logits


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

    def __init__(self, read: Callable[[], CacheStats]) -> None:
        self._read = read
        self._before = read()
        self._started = time.perf_counter()
        self._first: float | None = None
        self._answering = self._started
        self._prompt_read = self._before
        self._last = self._started
        self._sampled = 0
        self._looking_s = 0.0

    def token(self) -> None:
        self._last = time.perf_counter()
        if self._first is None:
            self._first, self._prompt_read = self._last, self._read()
            self._last = self._answering = time.perf_counter()  # a card's counters take a while
        self._sampled += 1

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around the work of a vision tower."""
        started = time.perf_counter()
        yield
        self._looking_s += time.perf_counter() - started

    def stats(self, prompt: int, cached: int, computed: int, generated: int) -> GenerationStats:
        now = self._read()
        cache = now - self._before
        ttft = (self._first or time.perf_counter()) - self._started
        decode = self._last - self._answering if self._sampled > 1 else 0.0
        return GenerationStats(
            prompt_tokens=prompt,
            cached_tokens=cached,
            generated_tokens=generated,
            ttft_s=ttft,
            prefill_tok_s=computed / (ttft - self._looking_s),
            decode_tok_s=(self._sampled - 1) / decode if decode else 0.0,
            expert_hits=cache.hits,
            expert_misses=cache.misses,
            expert_nbytes_read=cache.disk_nbytes,
            peak_rss_nbytes=peak_rss_nbytes(),
            experts_fetched=cache.fetched,
            experts_linked=cache.linked,
            experts_hosted=cache.hosted,
            experts_sliced=cache.sliced,
            link_nbytes=cache.device_nbytes,
            looking_s=self._looking_s,
            decode_steps=max(0, self._sampled - 1),
            decoded=now - self._prompt_read if self._sampled else CacheStats(),
        )
