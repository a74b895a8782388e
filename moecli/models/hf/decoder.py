"""Knows how a model of the library stands where our own decoder does; not where its experts lie.

Legend of the shapes: T tokens of all sequences end to end, S sequences, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moecli.models.batch import Batch, SequenceSlice
from moecli.models.hf.cache import HfCache, recurrent
from moecli.models.hf.probe import step


class HfDecoder:
    """A model of the library whose experts are ours. Sequences are computed one after the other.

    On the processor, in fp32: weights stay as they are stored, sums are the library's.
    """

    device = torch.device("cpu")

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` has all its weights; its experts are RoutedExperts."""
        self._model = model

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits fp32: [S, V] of each sequence's last token, or [T, V] with `all_logits`.

        Extends the caches of the batch; one whose step fails is empty afterwards.
        """
        found, begin = [], 0
        for piece in batch.slices:
            token_ids = batch.token_ids[begin : begin + piece.length]
            begin += piece.length
            found.append(self._sequence(token_ids, piece, batch.all_logits))
        return torch.cat(found)

    def _sequence(self, token_ids: Tensor, piece: SequenceSlice, all_logits: bool) -> Tensor:
        """Logits of one sequence's new tokens [n]: [n, V], or [1, V] of the last."""
        cache: Any = piece.cache
        assert isinstance(cache, HfCache), "a cache of our own decoder"
        cache.begin(piece.start, piece.length)
        library, logits = cache.library, []
        # The library's recurrent layers take up a state for one token at a time only.
        size = 1 if recurrent(library) else piece.length
        for first in range(0, piece.length, size):
            tokens = token_ids[None, first : first + size]
            result = step(self._model, tokens, library, all_logits)
            library = result.past_key_values
            logits.append(result.logits[0].float())
        cache.commit(library, piece.start + piece.length)
        return torch.cat(logits) if all_logits else logits[-1][-1:]
