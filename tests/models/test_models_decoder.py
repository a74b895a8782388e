"""The decoder against transformers on tiny random models, fp32, every way of feeding tokens."""

import functools

import pytest
import torch

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.few_tokens import FewTokens
from quant.ops import compiled
from tests.models.families import BORDER, FAMILIES, LENGTH, VARIANTS
from tests.models.tiny_models import (
    decoder_of,
    expected_logits,
    logits_in_steps,
    num_weights,
    oracle,
    spec_of,
    tokens,
)

TOLERANCE = 1e-5
STEPS = {
    "at_once": [LENGTH],
    "one_by_one": [1] * LENGTH,
    "odd_pieces": [7, 13, 3, 1, 20, 1],
    "on_chunk_borders": [8, 8, 16, 13],
}


@functools.cache
def case(family, name):
    model, ids = oracle(family, **FAMILIES[family].variants[name]), tokens(LENGTH)
    return decoder_of(model), ids, expected_logits(model, ids)


def difference(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 0.3, "logits too flat to tell a broken model"
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_logits_equal_transformers(family, name, steps):
    decoder, ids, expected = case(family, name)
    found = logits_in_steps(decoder, ids, STEPS[steps])
    assert difference(found, expected) <= TOLERANCE


def test_the_library_masks_absolute_chunks():
    """What the oracle rests on: token i sees j iff j <= i and both lie in one chunk."""
    from transformers.masking_utils import create_chunked_causal_mask

    model = oracle("llama4")
    model.config._attn_implementation = "eager"
    mask = create_chunked_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 20, 32),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(20)[None],
    )
    i, j = torch.arange(20)[:, None], torch.arange(20)
    assert torch.equal(mask[0, 0] == 0, (j <= i) & (i // 8 == j // 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch(family):
    """Three sequences at different positions: some prefill, one decodes, in the same forward."""
    model = oracle(family)
    decoder = decoder_of(model)
    ids = [tokens(n, seed=n) for n in (37, 21, 30)]
    caches = [KvCache(decoder.spec, 40, torch.float32) for _ in ids]
    rounds = [(5, 20, 3), (17, 1, 13), (1, 0, 14), (14, 0, 0)]
    got = [[], [], []]
    for sizes in rounds:
        parts = [s for s in range(3) if sizes[s]]
        pieces = tuple(SequenceSlice(caches[s], caches[s].length, sizes[s]) for s in parts)
        new = [ids[s][caches[s].length : caches[s].length + sizes[s]] for s in parts]
        logits = decoder.forward(Batch(torch.cat(new), pieces, all_logits=True))
        for s, rows in zip(parts, logits.split([sizes[s] for s in parts]), strict=True):
            got[s].append(rows)
    for s in range(3):
        assert difference(torch.cat(got[s]), expected_logits(model, ids[s])) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_that_of_transformers_token_by_token(family):
    """Across the borders of chunks and windows; three prompts together, each at its own length."""
    model = oracle(family)
    decoder = decoder_of(model)
    sequences = [tokens(n, seed=n) for n in (3, 14, 7)]
    caches = [KvCache(decoder.spec, 60, torch.float32) for _ in sequences]
    new = sequences
    for _ in range(12):
        pieces = [
            SequenceSlice(cache, cache.length, len(ids))
            for cache, ids in zip(caches, new, strict=True)
        ]
        new = list(decoder.forward(Batch(torch.cat(new), tuple(pieces))).argmax(-1, keepdim=True))
        sequences = [torch.cat(pair) for pair in zip(sequences, new, strict=True)]
    for found, prompt in zip(sequences, (3, 14, 7), strict=True):
        expected = expected_logits(model, found[:-1])[prompt - 1 :].argmax(-1)
        assert found[prompt:].tolist() == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_have_compiled_steps_of_few_tokens(family):
    """What the registry says: the others take the plain way, which is right too."""
    library = compiled()
    if library is None:
        pytest.skip("there is no compiler here")
    for changes in FAMILIES[family].variants.values():
        few = FewTokens.of(library, decoder_of(oracle(family, **changes)))
        assert (few is not None) == FAMILIES[family].compiled


def test_logits_of_each_sequence_s_last_token_only():
    decoder, ids, expected = case("llama4", "plain")
    caches = [KvCache(decoder.spec, LENGTH, torch.float32) for _ in range(2)]
    pieces = (SequenceSlice(caches[0], 0, 11), SequenceSlice(caches[1], 0, 30))
    found = decoder.forward(Batch(torch.cat((ids[:11], ids[:30])), pieces))
    assert difference(found, expected[[10, 29]]) <= TOLERANCE
    assert found.dtype == torch.float32


@pytest.mark.parametrize("keep", [0, 3, 16, 19, 24, 36, 40, 41, 44, 45])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncate_and_go_on(family, keep):
    """Another continuation after `truncate` sees nothing of what was forgotten."""
    model = oracle(family)
    decoder, ids = decoder_of(model), tokens(LENGTH)
    cache = KvCache(decoder.spec, 64, torch.float32)
    logits_in_steps(decoder, ids, [30, 15], cache)
    kept = cache.truncate(keep)
    assert kept <= keep
    if FAMILIES[family].sliding:  # the window before the last token but one is overwritten
        assert kept == (keep if keep >= LENGTH - 1 else 0)
    elif not FAMILIES[family].chunked or keep >= 40:  # the rings hold the chunk that begins at 40
        assert kept == keep
    else:
        assert kept == keep - keep % BORDER
    other = torch.cat((ids[:kept], tokens(12, seed=9)))
    found = logits_in_steps(decoder, other[kept:], [5, 1, 6], cache)
    assert difference(found, expected_logits(model, other)[kept:]) <= TOLERANCE


def test_a_forward_that_dies_leaves_a_usable_cache():
    """The experts fail in mid-forward across a chunk border: the length stays true."""
    model = oracle("llama4")
    decoder, ids = decoder_of(model), tokens(LENGTH)
    cache = KvCache(decoder.spec, LENGTH, torch.float32)
    logits_in_steps(decoder, ids[:13], [13], cache)
    block = decoder.layers[2].mlp
    experts = block.experts

    class Failing:
        def begin(self, *_):
            raise RuntimeError("no such expert")

        def resident(self, _):
            return None

    block.experts = Failing()
    with pytest.raises(RuntimeError):
        decoder.forward(Batch.of(ids[13:20], cache))
    assert cache.length == 8
    with pytest.raises(RuntimeError):
        decoder.forward(Batch.of(ids[8:9], cache))
    assert cache.length == 8
    block.experts = experts
    assert cache.truncate(5) == 0, "the rings no longer hold the first chunk"
    found = logits_in_steps(decoder, ids, [6, 39], cache)
    assert difference(found, expected_logits(model, ids)) <= TOLERANCE


class Recorder:
    """Experts that note what was guessed and what was asked for."""

    def __init__(self, experts):
        self.experts, self.guessed, self.chosen = experts, {}, {}

    def begin(self, layer, hidden, topk_ids, topk_weights):
        self.chosen[layer] = topk_ids
        return self.experts.begin(layer, hidden, topk_ids, topk_weights)

    def prefetch(self, layer, topk_ids):
        assert layer not in self.chosen, "a guess after the fact"
        self.guessed[layer] = topk_ids

    def resident(self, layer):
        return None


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("llama4", {}, [1, 2, 3]),
        ("llama4", {"interleave_moe_layer_step": 2}, [1, 3]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, [2]),
    ],
)
def test_guesses_of_the_next_layer_s_experts(family, changes, layers):
    """Right where layers add nothing to the hidden state; logits never depend on guesses."""
    model, ids = oracle(family, **changes), tokens(8)
    top_k = spec_of(model).experts_per_token
    with_guesses = decoder_of(model, wrap=Recorder, guesses=top_k + 1)
    cache = KvCache(with_guesses.spec, 8, torch.float32)
    found = with_guesses.forward(Batch.of(ids, cache, all_logits=True))
    assert torch.equal(found, logits_in_steps(decoder_of(model), ids, [8]))
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    inert = decoder_of(model, wrap=Recorder, guesses=top_k)
    recorder = inert.layers[layers[0]].mlp.experts
    logits_in_steps(inert, ids, [8])
    assert list(recorder.guessed) == layers
    for layer in layers:
        assert torch.equal(recorder.guessed[layer], recorder.chosen[layer])


def test_a_long_prompt_needs_no_guesses():
    decoder = decoder_of(oracle("llama4"), wrap=Recorder, guesses=2)
    recorder = decoder.layers[0].mlp.experts
    logits_in_steps(decoder, tokens(20), [20])
    assert recorder.chosen
    assert not recorder.guessed


def test_bfloat16_stays_near_float32():
    decoder, ids, expected = case("qwen3_moe", "plain")
    half = decoder_of(oracle("qwen3_moe"), torch.bfloat16)
    cache = KvCache(half.spec, LENGTH, torch.bfloat16)
    found = logits_in_steps(half, ids, [20, 25], cache)
    assert (found - expected).pow(2).mean().sqrt() < 0.05 * expected.std()
    mixed = logits_in_steps(decoder, ids, [20, 25], KvCache(half.spec, LENGTH, torch.bfloat16))
    assert (mixed - expected).pow(2).mean().sqrt() < 0.05 * expected.std()


def test_parameter_count_equals_transformers():
    for family, name in VARIANTS:
        model = oracle(family, **FAMILIES[family].variants[name])
        assert spec_of(model).num_params == num_weights(model), name
