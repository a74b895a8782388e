"""Knows how a token is drawn without leaving the device; the rules are those of moecli.sampler.

Every shape is static and nothing is asked of the host, so that drawing can be part of a captured
step. With the same random numbers it draws what moecli.sampler draws.

Legend: V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

from moecli.config import SamplingConfig

BAD_LOGITS = -1  # drawn where the largest logit is no finite number
Mode = Literal["greedy", "plain", "filtered"]


def mode_of(config: SamplingConfig) -> Mode:
    """How much work a draw takes; each mode is captured by itself."""
    if config.temperature == 0:
        return "greedy"
    unfiltered = config.top_k == 0 and config.top_p == 1 and config.min_p == 0
    return "plain" if unfiltered else "filtered"


class SamplingParams:
    """The settings of a draw as numbers on the device, so that a captured step can change them."""

    def __init__(self, device: torch.device | str) -> None:
        self.temperature = torch.ones(1, device=device)
        self.top_k = torch.zeros(1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(1, device=device)
        self.min_p = torch.zeros(1, device=device)

    def set(self, config: SamplingConfig) -> None:
        self.temperature.fill_(config.temperature or 1.0)
        self.top_k.fill_(config.top_k)
        self.top_p.fill_(config.top_p)
        self.min_p.fill_(config.min_p)


def draw(logits: Tensor, params: SamplingParams, point: Tensor, mode: Mode) -> Tensor:
    """A token, int64 [1], from logits [V]; `point` fp64 [1] in [0, 1) says which."""
    if mode == "greedy":
        token = logits.argmax(0, keepdim=True)
    elif mode == "plain":
        scores = logits.float() / params.temperature
        token = _at(scores.softmax(0), point, _last_index(scores))
    else:
        token = _filtered(logits.float() / params.temperature, params, point)
    return torch.where(logits.max().isfinite(), token, BAD_LOGITS)


def _filtered(scores: Tensor, params: SamplingParams, point: Tensor) -> Tensor:
    """Top-k, then top-p, then min-p; each keeps a prefix of the sorted tokens."""
    values, ids = scores.sort(descending=True)  # [V]
    last = _last_index(scores)
    kth = values.gather(0, (params.top_k - 1).clamp(min=0).minimum(last))  # [1]
    allowed = (values >= kth) | (params.top_k == 0)
    probabilities = values.masked_fill(~allowed, -torch.inf).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    keep = allowed & ((before < params.top_p) | (params.top_p >= 1))
    keep &= probabilities >= params.min_p * probabilities[:1]
    keep[:1] = True
    kept = values.masked_fill(~keep, -torch.inf).softmax(0)
    return ids.gather(0, _at(kept, point, keep.sum(0, keepdim=True) - 1))


def _last_index(scores: Tensor) -> Tensor:
    return torch.full((1,), scores.shape[0] - 1, device=scores.device)


def _at(probabilities: Tensor, point: Tensor, last: Tensor) -> Tensor:
    """The index, int64 [1], at which the cumulative probability passes `point`."""
    cumulative = probabilities.double().cumsum(0)
    return torch.searchsorted(cumulative, point * cumulative[-1:], right=True).minimum(last)
