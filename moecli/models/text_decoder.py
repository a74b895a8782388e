"""Knows what runs and conversations ask of a decoder and its caches, whosever they are."""

from typing import Protocol

import torch
from torch import Tensor

from moecli.models.batch import Batch


class SequenceCache(Protocol):
    """What one sequence leaves behind. Each decoder gets the caches that were made for it."""

    @property
    def length(self) -> int:
        """Tokens that are whole."""
        ...

    def truncate(self, length: int) -> int:
        """Forget the tokens from `length` on; returns how many are really kept."""
        ...

    def remember(self) -> None:
        """Called where a prompt ends: the next one probably repeats it, and not its answer."""
        ...


class TextDecoder(Protocol):
    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: Batch) -> Tensor:
        """Logits fp32: [S, V] of each sequence's last token, or [T, V] with `all_logits`."""
        ...
