"""Knows how the next token is drawn from logits; knows no model and no text.

The filters are transformers': temperature, then top-k, top-p and min-p, each on what the one before
left. Each keeps a prefix of the tokens sorted by probability, so only that prefix is ever sorted.

Whole vocabularies go through NumPy, on one thread: torch would divide them among threads, and where
others keep those busy, waiting for them took a hundred times longer than the work.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.errors import MoecliError

_FIRST_GUESS = 256  # how many of the likeliest tokens usually hold all that top-p keeps
_RUN = 512  # tokens whose probabilities are added up before it is known which of them is drawn
_MAXIMA_A_TOKEN = 16  # parts of a vocabulary for each token that is looked for: see `_largest`
_NEAR = 2.0**-20  # of a logit: what is nearer to it may equal it once divided by the temperature

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


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
    values: Floats = logits.float().numpy()
    likeliest = int(values.argmax())  # what is no number counts as the largest
    most = float(values[likeliest])
    if not math.isfinite(most):
        raise bad_logits()
    if config.temperature == 0:
        return likeliest
    point = float(torch.rand(1, generator=generator, dtype=torch.float64))
    if config.top_k == 0 and config.top_p == 1 and config.min_p == 0:
        return _draw(_exponentials(values, most, config.temperature), point)
    ids, probabilities = candidates(logits, config)
    return int(ids[_draw(probabilities, point)])


def bad_logits() -> MoecliError:
    return MoecliError(
        "the model computed logits that are no numbers",
        "its weights are probably damaged: make them again with `moecli quantize`",
    )


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Ids, Floats]:
    """Tokens that may be drawn and their probabilities, which sum to one: [n] each."""
    assert config.temperature > 0, "temperature 0 draws nothing"
    values: Floats = logits.float().numpy()
    most = float(values.max())
    if config.top_k:
        ids, weights = _likeliest(values, most, config.temperature, config.top_k)
        return _filtered(ids, weights, float(weights.sum()), config)
    weights = _exponentials(values, most, config.temperature)  # [V]
    total = float(weights.sum())
    if config.top_p == 1 and config.min_p == 0:
        return np.arange(len(values)), weights / np.float32(total)
    count = min(_FIRST_GUESS, len(values))
    while True:
        ids, weights = _likeliest(values, most, config.temperature, count)
        some_ids, kept = _filtered(ids, weights, total, config)
        if len(some_ids) < len(ids) or len(ids) == len(values):
            return some_ids, kept
        count = min(8 * count, len(values))


def _exponentials(values: Floats, most: float, temperature: float) -> Floats:
    """exp((value - most) / temperature): as probabilities are to the largest of them."""
    scaled = values - np.float32(most)
    scaled /= np.float32(temperature)
    result: Floats = np.exp(scaled, out=scaled)
    return result


def _draw(weights: Floats, point: float) -> int:
    """Where `point`, of 0 to 1, lies among weights [n], laid end to end; one that is not zero."""
    ends = np.add.reduceat(weights, np.arange(0, len(weights), _RUN)).cumsum(dtype=np.float64)
    aim = point * float(ends[-1])
    run = _first_beyond(ends, aim)
    inside = weights[run * _RUN : (run + 1) * _RUN].cumsum(dtype=np.float64)
    return run * _RUN + _first_beyond(inside, aim - (float(ends[run - 1]) if run else 0.0))


def _first_beyond(ends: NDArray[np.float64], aim: float) -> int:
    """Of ascending ends, the first beyond; the first to reach the last one where that is none."""
    return min(int(ends.searchsorted(aim, side="right")), int(ends.searchsorted(ends[-1])))


def _likeliest(values: Floats, most: float, temperature: float, count: int) -> tuple[Ids, Floats]:
    """The `count` largest and all that equal the last of them: ids and `_exponentials`, sorted."""
    ids = _largest(values, min(count, len(values)))
    weights = _exponentials(values[ids], most, temperature)
    scaled = values[ids] / np.float32(temperature)
    kept = int(np.count_nonzero(scaled >= scaled[min(count, len(ids)) - 1]))
    return ids[:kept], weights[:kept]


def _largest(values: Floats, count: int) -> Ids:
    """The `count` largest, sorted, and after them perhaps others.

    So many parts of a vocabulary have their largest at or above a border; then so many tokens lie
    there, and few besides. Only these are sorted.
    """
    width = max(_RUN, _MAXIMA_A_TOKEN * count)
    depth = len(values) // width
    if depth < 2:
        return np.argsort(-values, kind="stable")
    maxima = values[: depth * width].reshape(depth, width).max(axis=0)
    border = np.partition(maxima, width - count)[width - count]
    ids = np.flatnonzero(values >= border - abs(border) * np.float32(_NEAR))
    return ids[np.argsort(-values[ids], kind="stable")]


def _filtered(
    ids: Ids, weights: Floats, total: float, config: SamplingConfig
) -> tuple[Ids, Floats]:
    """Top-p and min-p on the likeliest tokens, sorted; the first always stays.

    `total`: of the weights of all tokens. The probabilities of those that stay sum to one.
    """
    probabilities = weights / np.float32(total)
    count = len(ids)
    if config.top_p < 1:  # a token stays while those before it do not make up top-p
        before = probabilities.cumsum() - probabilities
        count = int(np.count_nonzero(before < config.top_p))
    if config.min_p > 0:
        likely = probabilities >= config.min_p * probabilities[0]
        count = min(count, int(np.count_nonzero(likely)))
    kept = weights[: max(count, 1)]
    return ids[: len(kept)], kept / kept.sum()
