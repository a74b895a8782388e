"""Compiled steps over caches in int8: against plain PyTorch, by every instruction set of here."""

from dataclasses import replace

import pytest
import torch

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.int8_heads import quantize_heads
from tests.models.few_runs import (
    ISAS,
    assert_equal,
    compiled,
    decoder_of,
    ids,
    in_pieces,
    random_weights,
    run,
)
from tests.models.few_specs import CASES, SPEC, heads

if not ISAS:
    pytest.skip("there is no compiler here", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("plain_pytorch")


@pytest.mark.parametrize("case", ["as_qwen3", "as_llama4", "as_gpt_oss", "odd_heads"])
def test_a_cache_in_int8(isa: str, case: str) -> None:
    """Beside plain PyTorch, which rounds queries and weights of values to bf16 there.

    Numbers are stored by the same rule: they differ by a step where rounding was on the border.
    """
    spec = heads(6, 2, 34) if case == "odd_heads" else CASES[case]
    decoder = decoder_of(spec)
    sizes = [1, 1, 5, 1, *(([1] * 12) if spec.window else (8, 1, 3))]
    caches = [KvCache(spec, 20, torch.int8) for _ in range(2)]
    expected = in_pieces(decoder, caches[0], sizes, None)
    found = in_pieces(decoder, caches[1], sizes, compiled(isa, decoder))
    assert_equal(found, expected, 0.03)
    (numbers, scales), (ours, our_scales) = (cache.kept(0) for cache in caches)
    slots = slice(0, min(sum(sizes), numbers.shape[2]))
    assert (numbers[:, :, slots] == ours[:, :, slots]).float().mean() > 0.98
    assert scales is not None
    assert our_scales is not None
    torch.testing.assert_close(our_scales[:, :, slots], scales[:, :, slots], rtol=0.01, atol=0)


def test_int8_keeps_what_torch_keeps(isa: str) -> None:
    """Values that are their bias: of zeros, ties, the largest, and what is no number."""
    spec = replace(SPEC, layers=SPEC.layers[:1], attention_bias=True)
    tie = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.5, 3.0, *([0.0] * 10)]) * 0.25
    none = torch.tensor([1.0, torch.nan, -3.0, *([0.5] * 13)])
    tiny = torch.full((16,), 1e-40)
    wide = torch.tensor([3e38, -3e38, 1e30, *([1.0] * 13)])
    for first, second in ((tie, torch.zeros(16)), (none, tiny), (wide, -tie)):
        weights = random_weights(spec)
        weights["layers.0.v_proj"].zero_()
        weights["layers.0.v_proj.bias"] = torch.cat((first, second))
        decoder, cache = decoder_of(spec, weights), KvCache(spec, 2, torch.int8)
        run(decoder, Batch.of(ids(1), cache), compiled(isa, decoder))
        numbers, scales = cache.kept(0)
        assert scales is not None
        want, want_scales = quantize_heads(torch.stack((first, second)))
        torch.testing.assert_close(scales[1, :, 0], want_scales, rtol=0, atol=0, equal_nan=True)
        known = want_scales.isfinite()
        assert torch.equal(numbers[1, :, 0][known], want[known])


def test_int8_is_looked_at_in_parts(isa: str) -> None:
    """Lengths around the borders of parts of 512, every slot with a scale of its own."""
    spec = replace(CASES["groups_of_5"], layers=SPEC.layers[:1])
    decoder = decoder_of(spec)
    few = compiled(isa, decoder)
    for length in (511, 512, 513, 1300):
        generator = torch.Generator().manual_seed(length)
        caches = [KvCache(spec, length + 4, torch.int8) for _ in range(2)]
        past, scales = caches[0].kept(0)
        assert scales is not None
        past.random_(-127, 128, generator=generator)
        scales.copy_(torch.rand(scales.shape, generator=generator) / 64)
        for new, old in zip(caches[1].kept(0), (past, scales), strict=True):
            assert new is not None
            new.copy_(old)
        for cache in caches:
            cache.begin(0, length)
            cache.commit()
        expected = run(decoder, Batch.of(ids(1), caches[0]))
        assert_equal(run(decoder, Batch.of(ids(1), caches[1]), few), expected, 0.01)
