"""Knows how tokens follow each other on a device: one captured step, launched one token ahead.

The step draws its own next input, so the host only launches it and reads tokens behind it: while
the host looks at a token, the device already computes the next one. A token that ends the answer
costs one step in vain.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.device_sampler import BAD_LOGITS, Mode, SamplingParams, draw, mode_of
from moecli.graphs import Capture, Replay
from moecli.kv_cache import KvCache
from moecli.models.decoder import Decoder
from moecli.sampler import bad_logits, new_generator
from moecli.session import Session

_POINTS = 256  # random numbers on the device at once


@dataclass(frozen=True)
class Reading:
    """A token on its way to the host."""

    token: Tensor  # int64 [1], on the host
    arrived: "torch.cuda.Event | None"

    def wait(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.token)


class DecodeLoop:
    """The decode steps of one KV cache on one device.

    `capture` makes the step repeatable: a CUDA graph, or the plain step. `check` is called after
    each token and raises what went wrong beside the device.
    """

    def __init__(
        self, decoder: Decoder, cache: KvCache, capture: Capture, check: Callable[[], None]
    ) -> None:
        device = decoder.device
        self._decoder, self._cache, self._capture, self._check = decoder, cache, capture, check
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)  # draws so far
        self._points = torch.zeros(_POINTS, dtype=torch.float64, device=device)
        self._params = SamplingParams(device)
        self._replays: dict[Mode, Replay] = {}
        pinned = device.type == "cuda"
        self._landing = [torch.zeros(1, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._num_read = 0

    @torch.inference_mode()
    def tokens(
        self, session: Session, logits: Tensor, sampling: SamplingConfig
    ) -> Generator[int, None, None]:
        """Tokens after what `session` holds, whose last `logits` [V] are given; stop by closing.

        The session holds a token when the one after it is asked for. Raises MoecliError where
        logits are no numbers.
        """
        assert session.cache is self._cache, "a session of another KV cache"
        mode, generator = mode_of(sampling), new_generator(sampling.seed)
        cache, count = self._cache, 0
        self._prepare(session, sampling, mode)
        self._refill(generator)
        self._draw(logits, mode)
        reading = self._read()
        while True:
            count += 1
            following = None
            if len(session.tokens) < cache.ctx and count != sampling.max_tokens:
                if count % _POINTS == 0:
                    self._refill(generator)
                cache.begin(len(session.tokens), 1)
                self._replays[mode]()
                following = self._read()
            token = reading.wait()
            self._check()
            if token == BAD_LOGITS:
                raise bad_logits()
            yield token
            assert following is not None, "a token was asked for beyond the context or the limit"
            cache.commit()
            session.tokens.append(token)
            reading = following

    def _prepare(self, session: Session, sampling: SamplingConfig, mode: Mode) -> None:
        """Capture what is not yet captured, then set everything that a step reads or changes."""
        position = len(session.tokens)
        self._params.set(sampling)
        if mode not in self._replays:
            self._cache.begin(position, 1)  # trying a step writes where the next token will
            self._position.fill_(position)
            self._token.zero_()
            self._replays[mode] = self._capture(lambda: self._advance(mode))
        self._position.fill_(position)
        self._index.zero_()

    def _advance(self, mode: Mode) -> None:
        """One step: everything that the device does for a token."""
        logits = self._decoder.decode(self._token, self._position, self._cache)  # [1, V]
        self._draw(logits[0], mode)
        self._position.add_(1)

    def _draw(self, logits: Tensor, mode: Mode) -> None:
        point = self._points.index_select(0, self._index.remainder(_POINTS))  # [1]
        self._token.copy_(draw(logits, self._params, point, mode))
        self._index.add_(1)

    def _refill(self, generator: torch.Generator) -> None:
        self._points.copy_(torch.rand(_POINTS, generator=generator, dtype=torch.float64))

    def _read(self) -> Reading:
        """The token that the newest step draws, without waiting for it."""
        landing = self._landing[self._num_read % 2]
        self._num_read += 1
        landing.copy_(self._token, non_blocking=True)
        if not self._token.is_cuda:
            return Reading(landing.clone(), None)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        return Reading(landing, arrived)
