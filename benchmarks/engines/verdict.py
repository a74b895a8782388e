"""Compares an engine's greedy tokens with the reference's, and says what is a tie and what is not.

Each token is judged after the engine's own tokens before it, so that one tie early in an answer
does not hide what comes after it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines.reference import Reference

# Two candidates nearer to each other than this are a tie: logits have a standard deviation of 4,
# and rounding to bf16 changes them by up to 0.2 in the reference itself.
TIES = {"float32": 1e-3, "bfloat16": 0.2}


@dataclass(frozen=True)
class Difference:
    """A token that is not the reference's: how far its logit lies below the best one."""

    answer: int
    place: int
    gap: float


@dataclass(frozen=True)
class Comparison:
    """How an engine's answers stand beside the reference's."""

    dtype: str
    tokens: int
    tokens_equal: int
    answers: int
    answers_equal: int  # to what the reference generates by itself
    tie_below: float
    ties: tuple[Difference, ...]
    wrong: tuple[Difference, ...]
    logprob_error_mean: float | None  # of the likeliest tokens, to the reference in fp32
    logprob_error_max: float | None
    logprob_error_of_bf16: tuple[float, float] | None  # mean and max, of the reference in bf16

    @property
    def verdict(self) -> str:
        if self.wrong:
            return f"{len(self.wrong)} of {self.tokens} tokens wrong"
        if self.ties:
            return f"equal but for {len(self.ties)} ties in {self.tokens} tokens"
        return "equal"

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}


def compare(
    reference: Reference, dtype: str, prompts: list[list[int]], answers: list[dict[str, Any]]
) -> Comparison:
    """`answers`: of the engine, each its tokens and, where known, their log probabilities."""
    differences: list[Difference] = []
    theirs: list[float] = []
    rounded: list[float] = []
    equal = 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = answer["tokens"]
        equal += reference.greedy(prompt, len(tokens), dtype) == tokens
        logits = {name: reference.logits(prompt, tokens, name) for name in TIES}
        differences += _differences(number, tokens, logits[dtype], logits["float32"])
        if answer["logprobs"] is not None:
            theirs += _errors(answer["logprobs"], logits["float32"])
            own = [
                dict(zip(place, values.tolist(), strict=True))
                for place, values in _chosen(answer["logprobs"], logits["bfloat16"])
            ]
            rounded += _errors(own, logits["float32"])
    total = sum(len(answer["tokens"]) for answer in answers)
    return Comparison(
        dtype=dtype,
        tokens=total,
        tokens_equal=total - len(differences),
        answers=len(answers),
        answers_equal=equal,
        tie_below=TIES[dtype],
        ties=tuple(found for found in differences if found.gap < TIES[dtype]),
        wrong=tuple(found for found in differences if found.gap >= TIES[dtype]),
        logprob_error_mean=sum(theirs) / len(theirs) if theirs else None,
        logprob_error_max=max(theirs, default=None),
        logprob_error_of_bf16=(sum(rounded) / len(rounded), max(rounded)) if rounded else None,
    )


def _differences(answer: int, tokens: list[int], logits: Tensor, exact: Tensor) -> list[Difference]:
    best = logits.argmax(-1).tolist()
    return [
        Difference(answer, place, float(exact[place].max() - exact[place, token]))
        for place, (token, other) in enumerate(zip(tokens, best, strict=True))
        if token != other
    ]


def _chosen(logprobs: list[dict[str, float]], logits: Tensor) -> list[tuple[list[str], Tensor]]:
    """The tokens an engine names at each place, and the reference's log probabilities of them."""
    ours = logits.log_softmax(-1)
    return [
        (list(place), ours[number, [int(token) for token in place]])
        for number, place in enumerate(logprobs)
    ]


def _errors(logprobs: list[dict[str, float]], logits: Tensor) -> list[float]:
    errors: list[float] = []
    for place, ours in zip(logprobs, _chosen(logprobs, logits), strict=True):
        errors += (torch.tensor(list(place.values())) - ours[1]).abs().tolist()
    return errors
