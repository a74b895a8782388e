"""Keys and values in int8: what rounding costs, on its own, in attention, and in logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecli.footprint import kv_nbytes
from moecli.kv_cache import KvCache
from moecli.models import int8_heads
from moecli.models.attention import attend, attend_kept
from moecli.models.int8_heads import Int8Heads, quantize_heads
from tests.models.families import FAMILIES
from tests.models.test_models_kv_cache import CHUNK, SPEC
from tests.models.tiny_models import decoder_of, logits_in_steps, oracle, spec_of, tokens


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-20, 1e20))
def test_a_number_is_off_by_half_a_step_and_the_largest_by_little_more(seed, magnitude):
    x = heads(5, 3, 16, seed=seed) * magnitude
    numbers, scales = quantize_heads(x)
    assert numbers.dtype == torch.int8
    assert (numbers.shape, scales.shape) == (x.shape, x.shape[:-1])
    off = (numbers * scales.float()[..., None] - x).abs()
    step = scales.float()[..., None]
    assert (off <= 0.5001 * step + x.abs().amax(-1, keepdim=True) * 2**-8).all()
    inner = x.abs() < 0.99 * x.abs().amax(-1, keepdim=True)
    assert (off <= 0.5001 * step)[inner].all()
    assert (numbers.abs().amax(-1) >= 126).all(), "a part of the range is not used"


def test_nothing_becomes_nothing():
    numbers, scales = quantize_heads(torch.zeros(2, 4))
    assert not numbers.any()
    assert not scales.any()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_attention_of_one_token_is_that_over_expanded_heads(monkeypatch, length, num_heads):
    """Over several blocks, the last of them short; numbers behind the scales of a larger cache."""
    monkeypatch.setattr(int8_heads, "_BLOCK_TOKENS", 8)
    numbers, scales = quantize_heads(heads(2, 2, 50, 16))
    scales *= torch.arange(1, 51)  # every token's own
    keys, values = (Int8Heads(numbers[i, :, :length], scales[i, :, :length]) for i in range(2))
    queries = heads(1, num_heads, 16, seed=2) / 20
    expected = attend(queries, keys.dequantize(torch.float32), values.dequantize(torch.float32))
    found = attend_kept(queries, keys, values)
    assert found.shape == (1, num_heads * 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_memory_is_a_byte_a_number_and_a_scale_a_head():
    for ctx in (1, 7, 8, 9, 100):
        cache = KvCache(SPEC, ctx, torch.int8)
        assert cache.nbytes == kv_nbytes(SPEC, ctx, 512, "int8")
        assert cache.nbytes == 2 * 2 * (4 + 2) * (ctx + min(ctx, CHUNK))
        assert kv_nbytes(SPEC, ctx, 512, "auto") == kv_nbytes(SPEC, ctx, 512, "bf16")
        assert kv_nbytes(SPEC, ctx, 512, "bf16") == KvCache(SPEC, ctx).nbytes


def test_the_ring_keeps_the_scales_of_its_chunk_alone():
    """Token i's keys are i + 1 times a pattern, so a scale of another token would show."""
    cache = KvCache(SPEC, 32, torch.int8)
    pattern = torch.tensor([1.0, -0.5, 0.25, 0.0])
    start = 0
    for count in (3, 4, 9, 1, 6):
        sizes = torch.arange(start + 1, start + count + 1)[:, None, None]
        keys = sizes * pattern.expand(count, 2, 4)
        cache.begin(start, count)
        for layer in range(2):
            for _, last, seen, values in cache.append(layer, start, keys, -2 * keys):
                end = start + last
                begin = (end - 1) - (end - 1) % CHUNK if layer == 0 else 0
                expected = torch.arange(begin + 1, end + 1)[None, :, None] * pattern
                expanded = seen.dequantize(torch.float32)
                torch.testing.assert_close(expanded, expected.expand(2, -1, 4), rtol=0.01, atol=0.1)
                assert torch.equal(values.numbers, -seen.numbers)
        cache.commit()
        start += count
    assert cache.truncate(20) == 20
    assert cache.truncate(12) == 8


# Of the median token, against bf16 keys and values: 1.9% (llama4) and 1.0% were measured, of which
# the rounding to bf16 itself is 0.4%. Single tokens are off by more: another expert.
MOST = 0.03


@pytest.mark.parametrize("family", [name for name in FAMILIES if "deepseek" not in name])
@pytest.mark.parametrize("sizes", [(40,), (20, 20), (17, 1, 1, 13, 8), (1,) * 40])
def test_logits_stay_near_those_of_bf16(family, sizes):
    """A prompt at once, in pieces across chunk borders, and token by token."""
    decoder, ids = decoder_of(oracle(family)), tokens(40)
    plain = logits_in_steps(decoder, ids, sizes, KvCache(decoder.spec, 40))
    found = logits_in_steps(decoder, ids, sizes, KvCache(decoder.spec, 40, torch.int8))
    errors = (found - plain).pow(2).mean(-1).sqrt() / plain.std(-1)  # [T]
    assert 0 < errors.median() < MOST


def test_an_answer_goes_on_after_truncation():
    decoder, ids = decoder_of(oracle("llama4")), tokens(40)
    cache = KvCache(decoder.spec, 64, torch.int8)
    whole = logits_in_steps(decoder, ids, [30, 5, 5], cache)
    assert cache.truncate(35) == 35, "its chunk is still there"
    again = logits_in_steps(decoder, ids[35:], [5], cache)  # few or many: they round otherwise
    torch.testing.assert_close(again, whole[35:], rtol=1e-3, atol=1e-3)


def test_a_device_cannot_read_it_yet():
    cache = KvCache(spec_of(oracle("llama4")), 8, torch.int8)
    with pytest.raises(AssertionError, match="without their scales"):
        cache.storage(0)
