"""Routed experts with biases and the clamped activation of gpt-oss, against fp64."""

import pytest
import torch
from torch import Tensor

from quant import ops
from quant.kernels.cpu.backend import CpuBackend
from quant.kernels.cpu.library import Library, NoLibrary, library
from quant.layout import ExpertLayout
from quant.ops import Backend
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from tests.quant.quant_experts import Experts, assert_close, random

HIDDEN, INNER, EXPERTS = 384, 256, 6
try:
    ISAS = library().isas
except NoLibrary:
    ISAS = []
BACKENDS = {"reference": 1e-5, "torch": 1e-5} | dict.fromkeys(ISAS, 0.02)  # of the largest value


def backend_of(name: str) -> Backend:
    if name in ISAS:
        return CpuBackend(Library(library().path, name))
    return ops._TORCH_BACKENDS[name]


class Case:
    """Six experts, tokens that choose three of them, and what is exactly right."""

    def __init__(self, scheme: QuantScheme, num_tokens: int) -> None:
        self.experts = Experts(ExpertLayout(HIDDEN, INNER, scheme), num_experts=EXPERTS)
        self.biases = 3 * random(EXPERTS, 2 * INNER + HIDDEN, seed=7)
        self.ids = random(num_tokens, 5, seed=1).argsort(-1)[:, :3]
        self.ids[num_tokens // 2 :] = torch.tensor([0, 3, 1])
        self.hidden = random(num_tokens, HIDDEN)
        self.weights = random(num_tokens, 3, seed=2).sigmoid()

    def exact(self, begin: int, end: int) -> Tensor:
        """fp64 [T, k, H]"""
        experts = [self._expert(expert, begin, end) for expert in range(EXPERTS)]
        every = torch.stack(experts, dim=1)  # [T, E, H]
        rows = torch.arange(len(self.ids))[:, None]
        return every[rows, self.ids] * self.weights[..., None].double()

    def _expert(self, expert: int, begin: int, end: int) -> Tensor:
        blob = self.experts.blob(expert)
        weights = self.experts.layout.views(blob)
        parts = (weights.gate, weights.up, weights.down)
        gate, up, down = (dequantize(part, torch.float64) for part in parts)
        of_gate, of_up, of_down = self.biases[expert].double().split((INNER, INNER, HIDDEN))
        x = self.hidden.double()
        gates, ups = x @ gate.T + of_gate, x @ up.T + of_up
        assert ((gates > 7).any() and (ups.abs() > 7).any()) or len(x) < 2, "nothing is cut off"
        gates, ups = gates.clamp(max=7), ups.clamp(-7, 7)
        inner = gates / (1 + (-1.702 * gates).exp()) * (ups + 1)
        return inner[:, begin:end] @ down[:, begin:end].T + (of_down if begin == 0 else 0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(8, 128)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_biases_and_clamped_swiglu(name: str, scheme: QuantScheme, num_tokens: int) -> None:
    """Of whole experts and of spans, few tokens and many; the sum of contributions too."""
    backend, case = backend_of(name), Case(scheme, num_tokens)
    call = (case.hidden, case.ids, case.weights, case.experts.addresses(), case.experts.layout)
    for span in ((0, INNER), (0, 128), (128, INNER)):
        options = {"activation": "clamped_swiglu", "weight_on_input": False, "span": span}
        found = backend.routed_experts(*call, **options, biases=case.biases)
        exact = case.exact(*span)
        assert_close(found, exact, BACKENDS[name])
        out = torch.zeros(num_tokens, HIDDEN)
        backend.add_routed_experts(out, *call, **options, biases=case.biases)
        assert_close(out, exact.sum(1), BACKENDS[name])


@pytest.mark.parametrize("name", BACKENDS)
def test_biases_with_silu_and_an_expert_that_is_not_here(name: str) -> None:
    backend, case = backend_of(name), Case(QuantScheme(4, 32), 9)
    addresses = case.experts.addresses({1, 2, 3, 4, 5})
    call = (case.hidden, case.ids, case.weights, addresses, case.experts.layout)
    options = {"activation": "silu", "weight_on_input": False, "span": (0, INNER)}
    plain = backend.routed_experts(*call, **options)
    case.biases[:, : 2 * INNER] = 0
    found = backend.routed_experts(*call, **options, biases=case.biases)
    assert (found[case.ids == 0] == 0).all(), "the bias of an expert that is not here"
    added = case.biases[case.ids, 2 * INNER :] * case.weights[..., None]
    added[case.ids == 0] = 0
    assert_close(found - plain, added.double(), 1e-5)
