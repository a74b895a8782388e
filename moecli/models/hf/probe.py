"""Knows how a model of the library is run; finds out on tensors without memory what it keeps.

No table of families says how large their caches are: the library's own code is asked.
"""

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moecli.errors import MoecliError
from moecli.models.hf.cache import layers_of, nbytes_of, recurrent
from moecli.models.hf.library import FAILURES, build, experts_modules
from moecli.models.hf.modules import RoutedExperts, replace
from moecli.models.provider import Ready, Resident


def step(model: PreTrainedModel, token_ids: Tensor, library: Any, all_logits: bool = False) -> Any:
    """The library's output for token_ids [1, T] after those that `library`, its cache, holds.

    Of the logits the last are there at least.
    """
    chooses = "logits_to_keep" in _parameters(type(model).forward)
    rows = {"logits_to_keep": 1} if chooses and not all_logits else {}
    return model(token_ids, past_key_values=library, use_cache=True, **rows)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(function).parameters)


class Probe:
    """A model on the meta device that can be run."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises MoecliError for what cannot be run."""
        self._model = build(config, buffers=False)
        self._listener = _Listener()
        for module in experts_modules(self._model):
            replace(
                self._model,
                module.name,
                RoutedExperts(module.layer, module.num_experts, self._listener),
            )
        try:
            self.recurrent = recurrent(self._run(1, None))
        except FAILURES as error:
            kind = self._model.config.model_type
            raise MoecliError(
                f"transformers' `{kind}` does not run on shapes alone, so moecli cannot plan it: "
                f"{error}",
                "please report it, with the model's name",
            ) from error

    @property
    def experts_per_token(self) -> int:
        """What the routers have asked for."""
        return self._listener.top_k

    def cache_nbytes(self, ctx: int, chunk: int) -> int:
        """Most bytes that one sequence of `ctx` tokens keeps, read `chunk` tokens at once."""
        chunk = min(chunk, ctx)
        before = ctx - chunk
        library = self._run(before, None) if before else None
        library = self._run(chunk, library)
        return sum(nbytes_of(layer) for layer in layers_of(library))

    @torch.no_grad()
    def _run(self, tokens: int, library: Any) -> Any:
        """The library's cache after so many tokens more."""
        token_ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        return step(self._model, token_ids, library).past_key_values


class _Listener:
    """A provider of experts that notes how many a token asks for."""

    top_k = 0

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        self.top_k = topk_ids.shape[-1]
        return Ready(torch.empty_like(hidden))

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """Nothing to fetch."""

    def resident(self, layer: int) -> Resident | None:
        """No expert has bytes."""
        return None
