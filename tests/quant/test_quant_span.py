"""A span of an expert is computed from the bytes of its rows alone: the others may be missing."""

import pytest
import torch

from quant import ops
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme
from tests.quant.quant_experts import DEVICES, Experts, assert_close, random

BACKENDS = [name for name in ops.BACKENDS if name != "auto"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 9, 40])
@pytest.mark.parametrize(("bits", "span"), [(4, (32, 128)), (8, (64, 128)), (4, (32, 96))])
def test_what_lies_outside_the_span_is_not_used(
    backend: str, device: str, tokens: int, bits: int, span: tuple[int, int]
) -> None:
    """It is NaN when read as scales."""
    if backend == "triton":
        pytest.importorskip("triton")
    layout = ExpertLayout(64, 128, QuantScheme(bits, 32))
    experts = Experts(layout, 3, device)
    hidden = random(tokens, 64).to(device)
    ids = torch.arange(2 * tokens, device=device).remainder(3).view(tokens, 2)
    weights = random(tokens, 2, seed=1).to(device)
    exact = experts.contributions(hidden, ids, weights, False, span=span).sum(dim=1)
    outside = [*layout.runs(0, span[0])]
    outside += layout.runs(span[1], 128) if span[1] < 128 else ()
    for expert in range(3):
        blob = experts.blob(expert)
        for run in outside:
            shape, start = (run.num_runs, run.nbytes), blob.storage_offset() + run.offset
            blob.as_strided(shape, (run.pitch, 1), start).fill_(0xFF)
    before = ops.current_backend()
    ops.set_backend(backend)
    try:
        out = torch.zeros(tokens, 64, device=device)
        ops.add_routed_experts(out, hidden, ids, weights, experts.addresses(), layout, span=span)
    finally:
        ops.set_backend(before)
    assert_close(out, exact, 5e-2 if backend == "cpu" else 1e-5)  # activations in 8 bits
