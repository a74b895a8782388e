"""Knows how the next token is drawn from logits; knows no model and no text.

The filters are transformers': temperature, then top-k, top-p and min-p, each on what the one before
left. Each keeps a prefix of the tokens sorted by probability, so only that prefix is ever sorted.

Whole vocabularies go through NumPy, on one thread: torch would divide them among threads, and where
others keep those busy, waiting for them took a hundred times longer than the work.
"""

import math

import numpy as np
import torch
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.errors import MoecliError

_FIRST_GUESS = 256  # how many of the likeliest tokens usually hold all that top-p keeps


def new_generator(seed: int | None) -> torch.Generator:
    """Random numbers that `seed` repeats; None: new ones each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """Draw a token from logits [V]; temperature 0 takes the likeliest.

    Raises MoecliError where the largest logit is no finite number.
    """
    values = logits.float().numpy()
    likeliest = int(values.argmax())  # what is no number counts as the largest
    if not math.isfinite(values[likeliest]):
        raise bad_logits()
    if config.temperature == 0:
        return likeliest
    ids, probabilities = candidates(logits, config)
    cumulative = probabilities.double().cumsum(0)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, point, right=True))
    return int(ids[min(index, len(ids) - 1)])


def bad_logits() -> MoecliError:
    return MoecliError(
        "the model computed logits that are no numbers",
        "its weights are probably damaged: make them again with `moecli quantize`",
    )


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn and their probabilities, which sum to one: ids [n], fp32 [n]."""
    assert config.temperature > 0, "temperature 0 draws nothing"
    scores = torch.from_numpy(logits.float().numpy() / config.temperature)  # [V]
    if config.top_k == 0 and config.top_p == 1 and config.min_p == 0:
        return torch.arange(len(scores)), scores.softmax(0)
    if config.top_k:
        values, ids = _top_k(scores, config.top_k)
        ids, kept = _filter(ids, values, values.softmax(0), config)
        return ids, kept.softmax(0)
    total, count = _log_sum_exp(scores), min(_FIRST_GUESS, len(scores))
    while True:
        values, ids = scores.topk(count)
        some_ids, kept = _filter(ids, values, (values - total).exp(), config)
        if len(kept) < count or count == len(scores):
            return some_ids, kept.softmax(0)
        count = min(8 * count, len(scores))


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, sorted, and all that equal the smallest of them."""
    values, ids = scores.topk(min(k, len(scores)))
    count = int(np.count_nonzero(scores.numpy() >= values[-1].item()))
    if count > len(values):
        values, ids = scores.topk(count)
    return values, ids


def _log_sum_exp(scores: Tensor) -> float:
    most = scores.numpy().max()
    return float(most + np.log(np.exp(scores.numpy() - most).sum()))


def _filter(
    ids: Tensor, scores: Tensor, probabilities: Tensor, config: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Top-p and min-p on the likeliest tokens, sorted; the first always stays."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    if config.top_p < 1:  # a token stays while those before it do not make up top-p
        keep &= probabilities.cumsum(0) - probabilities < config.top_p
    if config.min_p > 0:
        keep &= probabilities >= config.min_p * probabilities[0]
    keep[0] = True
    return ids[keep], scores[keep]
