"""What tells whether vLLM answers rightly: kernels lent to it, verdicts, reasons of refusals."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.engines.plain_kernels import expand
from benchmarks.engines.verdict import compare
from benchmarks.engines.vllm_run import refusal
from benchmarks.interop import FAMILIES, SCHEMES, all_runs
from benchmarks.interop_table import table
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme

SCORES = torch.tensor([[4.0, 3.95, 0.0], [1.0, 5.0, 2.0], [0.0, 1.0, 3.0]])  # [T, V]


@dataclass(frozen=True)
class Fixed:
    """A reference with the same logits whatever came before."""

    scores: Tensor

    def greedy(self, prompt: list[int], count: int, dtype: str) -> list[int]:
        return self.scores[:count].argmax(-1).tolist()

    def logits(self, prompt: list[int], answer: list[int], dtype: str) -> Tensor:
        return self.scores


def answer(*tokens: int, off: float = 0.0) -> list[dict]:
    logprobs = SCORES.log_softmax(-1) + off
    named = [{str(t): float(row[t])} for t, row in zip(tokens, logprobs, strict=True)]
    return [{"tokens": list(tokens), "logprobs": named}]


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(4, 128), QuantScheme(8, 64)])
def test_lent_kernels_expand_what_moecli_packs(scheme: QuantScheme) -> None:
    weight = torch.randn(3, 24, 256, generator=torch.Generator().manual_seed(0))
    packed = [quantize(matrix, scheme) for matrix in weight]
    expected = torch.stack([dequantize(matrix, torch.bfloat16) for matrix in packed])
    words, scales = (torch.stack([getattr(m, n) for m in packed]) for n in ("packed", "scale"))
    assert (scales < 0).any() or scheme.bits == 8
    found = expand(words.view(torch.int32), scales, scheme.bits)
    assert torch.equal(found, expected)


def test_the_same_tokens_are_equal() -> None:
    found = compare(Fixed(SCORES), "float32", [[1]], answer(0, 1, 2))
    assert (found.verdict, found.answers_equal, found.tokens_equal) == ("equal", 1, 3)
    assert found.logprob_error_max == pytest.approx(0, abs=1e-6)


def test_a_near_candidate_is_a_tie_in_bf16_and_wrong_in_fp32() -> None:
    rounded = compare(Fixed(SCORES), "bfloat16", [[1]], answer(1, 1, 2))
    exact = compare(Fixed(SCORES), "float32", [[1]], answer(1, 1, 2))
    assert rounded.verdict == "equal but for 1 ties in 3 tokens"
    assert exact.verdict == "1 of 3 tokens wrong"
    assert exact.wrong[0].gap == pytest.approx(0.05)
    assert exact.answers_equal == 0


def test_errors_of_log_probabilities_are_counted() -> None:
    found = compare(Fixed(SCORES), "float32", [[1]], answer(0, 1, 2, off=0.25))
    assert found.logprob_error_mean == pytest.approx(0.25)


def test_a_refusal_is_what_was_raised_first_with_its_reasons() -> None:
    log = "\n".join(
        (
            "(Worker pid=1) DEBUG 11-25 13:47:58 [x.py:1] WNA16 MoE backend 'CPU' does not "
            "support the deployment configuration since kernel does not support it.",
            "(Worker pid=1) ERROR 11-25 13:47:58 [y.py:9] Traceback (most recent call last):",
            "(Worker pid=1) ERROR 11-25 13:47:58 [y.py:9]     raise ValueError(",
            "(Worker pid=1) ERROR 11-25 13:47:58 [y.py:9] ValueError: no kernel. Reasons: ",
            "(Worker pid=1) ERROR 11-25 13:47:58 [y.py:9]  Fast: not here",
            "RuntimeError: Engine core initialization failed. See root cause above.",
        )
    )
    refused = refusal(log)
    assert str(refused) == "ValueError: no kernel. Reasons: \n Fast: not here"
    assert len(refused.reasons) == 1


def test_every_family_and_scheme_is_run_with_lent_kernels_once() -> None:
    names = [run.name for run in all_runs()]
    assert len(names) == len(set(names))
    lent = {(run.model, run.scheme) for run in all_runs() if run.kernels == "lent"}
    assert {(family, "int4 (default)") for family in FAMILIES} <= lent
    assert {(family, "int8") for family in FAMILIES} <= lent
    assert set(SCHEMES) - {scheme for _, scheme in lent} == {"int4, dense 16 bits"}


def test_the_table_of_the_docs_has_a_line_for_model_scheme_and_kernels() -> None:
    usual = {"model": "mixtral", "scheme": "int8", "kernels": "lent", "dtype": "float32"}
    one = usual | {"ranks": 1, "expert_parallel": False, "server": False, "verdict": "equal"}
    ties = {"server": True, "verdict": "equal but for 3 ties in 128 tokens", "tokens": 128}
    runs = {
        "a": one,
        "b": one | {"ranks": 2, "expert_parallel": True, "verdict": "refused"},
        "c": one | ties,
        "d": one | {"ranks": 2, "model": "llama4"},
    }
    assert table(runs).splitlines()[2:] == [
        "| lent, fp32 | int8 | llama4 |  | equal |  |",
        "| lent, fp32 | int8 | mixtral | equal; server: equal but for 3 ties |  | refused |",
    ]
