"""Knows what an engine asks of the machine it runs on, be it the processor or a device."""

from contextlib import AbstractContextManager
from typing import Protocol

from moecli.generation import TokenSource
from moecli.models.text_decoder import TextDecoder
from moecli.session import Session
from offload.stats import CacheStats


class Parts(Protocol):
    """A model that is placed and ready."""

    @property
    def decoder(self) -> TextDecoder: ...

    @property
    def tokens(self) -> TokenSource: ...

    @property
    def stats(self) -> CacheStats:
        """What the experts cost since the model was opened."""
        ...

    @property
    def peak_vram_nbytes(self) -> int | None:
        """The most VRAM that this process has taken so far; None where it takes none."""
        ...

    def begin_step(self) -> None:
        """The next chunk of a prompt begins."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Around every generation."""
        ...

    def new_session(self) -> Session:
        """An empty conversation."""
        ...

    def check_integrity(self, deep: bool = False) -> None: ...

    def close(self) -> None: ...
