"""Knows the typed stream that a generation is, and the numbers that end it."""

from dataclasses import dataclass
from typing import Literal

from offload.stats import CacheStats

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class PrefillProgress:
    """`done` of `total` new prompt tokens are in the KV cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Looking:
    """The picture `number` of `total` in the prompt is being looked at; that takes a while."""

    number: int
    total: int


@dataclass(frozen=True)
class TextDelta:
    """Whole characters that became certain with the newest token; never empty."""

    text: str


@dataclass(frozen=True)
class GenerationStats:
    """Numbers of one generation; times in seconds, rates in tokens a second."""

    prompt_tokens: int  # tokens of the prompt, cached ones included
    cached_tokens: int  # of these, how many were already in the KV cache
    generated_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float  # 0.0 when fewer than two tokens were generated
    expert_hits: int  # (step, layer, expert) requests met by a resident expert
    expert_misses: int
    expert_nbytes_read: int  # bytes of experts brought from disk
    peak_rss_nbytes: int
    # On a graphics card; a fetched expert came into a slot, a linked one was read where it lies.
    experts_fetched: int = 0
    experts_linked: int = 0
    experts_hosted: int = 0  # computed by the processor
    experts_sliced: int = 0  # requests of which a part is always in VRAM: no hits, no misses
    link_nbytes: int = 0  # of experts that went over the link, prompt included
    peak_vram_nbytes: int | None = None
    image_tokens: int = 0  # of the prompt, cached ones included: patches of pictures
    looking_s: float = 0.0  # in the vision tower; part of ttft_s, not of prefill_tok_s
    decode_steps: int = 0  # forward passes after the first token
    decoded: CacheStats = CacheStats()  # noqa: RUF009 frozen. What experts cost in these
    grown_rss_nbytes: int | None = None  # the most that was taken since the model was opened

    @property
    def hit_rate(self) -> float | None:
        """Share of expert requests met without a read; None when nothing was asked for."""
        requests = self.expert_hits + self.expert_misses
        return self.expert_hits / requests if requests else None


@dataclass(frozen=True)
class Finished:
    """The last event of every generation, cancelled ones too."""

    reason: FinishReason
    text: str  # the whole answer, stop strings removed
    stats: GenerationStats


Event = PrefillProgress | Looking | TextDelta | Finished
