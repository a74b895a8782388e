"""Knows how tokens follow each other on the processor: sample, hand out, compute the next."""

from collections.abc import Callable, Generator

from torch import Tensor

from moecli.config import SamplingConfig
from moecli.generation import forward
from moecli.models.text_decoder import TextDecoder
from moecli.sampler import new_generator, sample
from moecli.session import Session


class Stepwise:
    """A TokenSource: one forward pass a token, `begin_step` before each."""

    def __init__(self, decoder: TextDecoder, begin_step: Callable[[], None]) -> None:
        self._decoder = decoder
        self._begin_step = begin_step

    def __call__(
        self, session: Session, logits: Tensor, sampling: SamplingConfig
    ) -> Generator[int, None, None]:
        generator = new_generator(sampling.seed)
        while True:
            token = sample(logits, sampling, generator)
            yield token
            self._begin_step()
            logits = forward(self._decoder, session, [token])
