"""Compiled steps of few tokens, by every instruction set that runs here: against plain PyTorch.

Legend of the shapes: T tokens, H hidden, N query heads, K key heads, D head size, E experts.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import GroupedRouting, LayerSpec, ModelSpec
from moecli.models.few_tokens import FewTokens
from quant import ops
from quant.bnb import BnbWeight
from quant.quantize import dequantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight
from tests.models.few_runs import (
    ISAS,
    TOLERANCE,
    NoExperts,
    assert_equal,
    compiled,
    decoder_of,
    ids,
    in_pieces,
    library_of,
    new_cache,
    random_weights,
    run,
)
from tests.models.few_specs import CASES, CHUNKED, GROUPED, SPEC, WINDOWS
from tests.quant.quant_experts import random_weight

if not ISAS:
    pytest.skip("there is no compiler here", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("plain_pytorch")


@pytest.mark.parametrize("case", CASES)
def test_tokens_one_by_one_and_a_few_at_once(isa: str, case: str) -> None:
    """Over the borders of chunks: pieces end there, where there are chunks.

    And through windows of 8, which several tokens at once may fill, and only one at a time move on.
    """
    spec = CASES[case]
    sizes = [1, 1, 5, 1, *(([1] * 28) if spec.window else (8, 2, 3, 1, 1, 1, 8, 4))]
    decoder = decoder_of(spec)
    found = in_pieces(decoder, new_cache(spec, 36), sizes, compiled(isa, decoder))
    assert_equal(found, in_pieces(decoder, new_cache(spec, 36), sizes, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["as_qwen3", "groups_of_5", "no_groups"])
def test_a_long_context_is_looked_at_in_parts(isa: str, case: str, dtype: torch.dtype) -> None:
    """Lengths around the borders of parts of 512."""
    spec = replace(CASES[case], layers=CASES[case].layers[:1])
    decoder = decoder_of(spec)
    few = compiled(isa, decoder)
    for length in (510, 511, 512, 513, 1300):
        caches = [new_cache(spec, length + 4, dtype) for _ in range(2)]
        generator = torch.Generator().manual_seed(length)
        past = torch.randn(caches[0].storage(0)[:, :, :length].shape, generator=generator)
        for cache in caches:
            cache.storage(0)[:, :, :length] = past
            cache.begin(0, length)
            cache.commit()
        expected = run(decoder, Batch.of(ids(3), caches[0]))
        found = run(decoder, Batch.of(ids(3), caches[1]), few)
        assert_equal(found, expected, TOLERANCE if dtype == torch.float32 else 0.01)
        assert_equal(
            caches[1].storage(0)[:, :, length:-1].float(),
            caches[0].storage(0)[:, :, length:-1].float(),
            TOLERANCE if dtype == torch.float32 else 0.005,
        )


def test_a_large_score_neither_overflows_nor_drowns(isa: str) -> None:
    """Queries a hundred times as long: one slot takes all, far from the first part."""
    spec = replace(SPEC, layers=SPEC.layers[:1], qk_norm="none")
    weights = random_weights(spec)
    weights["layers.0.q_proj"] *= 100
    decoder = decoder_of(spec, weights)
    sizes = [8] * 80
    found = in_pieces(decoder, new_cache(spec, 640), sizes, compiled(isa, decoder))
    assert_equal(found, in_pieces(decoder, new_cache(spec, 640), sizes, None), 1e-4)


def test_several_sequences_each_with_its_own_position(isa: str) -> None:
    for spec in (SPEC, CHUNKED):
        decoder = decoder_of(spec)
        few = compiled(isa, decoder)
        caches = [[new_cache(spec, 40) for _ in range(3)] for _ in range(2)]
        for way in caches:
            for index, cache in enumerate(way):
                run(decoder, Batch.of(ids(5 + 9 * index, seed=index), cache))
        results = []
        for way, how in zip(caches, (None, few), strict=True):
            slices = tuple(
                SequenceSlice(cache, cache.length, count)
                for cache, count in zip(way, (3, 2, 1), strict=True)
            )
            results.append(run(decoder, Batch(ids(6), slices), how))
        assert_equal(results[1], results[0])


@torch.inference_mode()
def test_logits_of_the_rows_that_are_wanted(isa: str) -> None:
    """Of each sequence's last token; with a head that is read, and one that is not."""
    for head in ("read", "of_bitsandbytes"):
        spec = replace(SPEC, tie_word_embeddings=False)
        weights: dict[str, Any] = random_weights(spec)
        if head == "of_bitsandbytes":
            weights["lm_head"] = BnbWeight.of(weights["lm_head"], "nf4", "cpu")
        decoder = decoder_of(spec, weights)
        few = compiled(isa, decoder)
        caches = [[new_cache(spec, 8) for _ in range(3)] for _ in range(2)]
        plain, ours = (
            Batch(
                ids(6), tuple(SequenceSlice(c, 0, n) for c, n in zip(way, (3, 2, 1), strict=True))
            )
            for way in caches
        )
        for cache, count in zip(caches[1], (3, 2, 1), strict=True):
            cache.begin(0, count)
        found = few.logits(decoder.embedding(ours.token_ids), decoder.make_step(ours))
        assert_equal(found, decoder.forward(plain))


@pytest.mark.parametrize("case", ["as_qwen3", "as_llama4", "groups_of_5"])
def test_a_token_depends_on_neither_threads_nor_company(isa: str, case: str) -> None:
    spec, sizes = CASES[case], [8, 8, 4]
    decoder = decoder_of(spec, experts=NoExperts())
    few, threads = compiled(isa, decoder), torch.get_num_threads()
    alone = in_pieces(decoder, new_cache(spec, 20), [1] * 20, few)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(in_pieces(decoder, new_cache(spec, 20), sizes, few), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("scheme", "width"),
    [("int4-g32", 160), ("int4-g64", 192), ("int8-g32", 96), ("int8-g128", 256)],
)
def test_quantized_weights(isa: str, scheme: str, width: int) -> None:
    """Against plain PyTorch: 8 bits of an activation cost up to 0.5% of a product.

    Widths leave rests of what vectors hold.
    """
    spec = replace(
        CHUNKED,
        hidden_size=width,
        head_dim=32,
        shared_intermediate_size=width,
        attention_bias=True,
    )
    weights: dict[str, Any] = random_weights(spec)
    found = QuantScheme.parse(scheme)
    for index, tensor in enumerate(spec.dense_tensors):
        if tensor.linear:
            weights[tensor.name] = random_weight(*tensor.shape, found, seed=index)
            weights[tensor.name].scale.mul_(tensor.shape[1] ** -0.5 * 8)
    decoder = decoder_of(spec, weights)
    plain = {
        name: dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
        for name, weight in weights.items()
    }
    sizes = [1, 7, 1, 3, 4, 8, 2, 6]
    expected = in_pieces(decoder_of(spec, plain), new_cache(spec, 32), sizes, None)
    found = in_pieces(decoder, new_cache(spec, 32), sizes, compiled(isa, decoder))
    assert (found - expected).norm() <= 0.03 * expected.norm()


def test_quantized_weights_give_the_same_with_any_threads(isa: str) -> None:
    """Rows as they lie, of one token and two, and turned rows, of three to eight."""
    spec = replace(CHUNKED, hidden_size=160, head_dim=32, shared_intermediate_size=160)
    weights: dict[str, Any] = random_weights(spec)
    for index, tensor in enumerate(spec.dense_tensors):
        if tensor.linear:
            weights[tensor.name] = random_weight(*tensor.shape, QuantScheme(4, 32), seed=index)
    decoder = decoder_of(spec, weights, NoExperts())
    few, threads, sizes = compiled(isa, decoder), torch.get_num_threads(), [1, 7, 2, 3, 3, 8, 5]
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(in_pieces(decoder, new_cache(spec, 29), sizes, few))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(isa: str, dtype: torch.dtype) -> None:
    weights = random_weights(CHUNKED, dtype)
    decoder = decoder_of(CHUNKED, weights)
    found = in_pieces(decoder, new_cache(CHUNKED, 9), [1, 7, 1], compiled(isa, decoder))
    assert_equal(found, in_pieces(decoder, new_cache(CHUNKED, 9), [1, 7, 1], None))


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "softmax_of_chosen", "grouped"])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 1), (6, 6), (128, 8), (128, 2), (300, 4)])
def test_experts_that_tie_come_in_the_order_of_torch(router: str, experts: int, top_k: int) -> None:
    """A logit is one of three components, so that each occurs often and no sum is rounded."""
    spec = replace(
        SPEC,
        layers=SPEC.layers[:1],
        num_experts=experts,
        experts_per_token=top_k,
        router=router,
        normalize_topk=router == "softmax",
        grouped_routing=GroupedRouting(1, 1, 1.0) if router == "grouped" else None,
    )
    weights = random_weights(spec)
    rows = torch.randint(0, 3, (experts,), generator=torch.Generator().manual_seed(0))
    weights["layers.0.router"] = torch.eye(spec.hidden_size)[rows]
    provider = NoExperts()
    decoder = decoder_of(spec, weights, provider)
    sizes = [1, 8, 8]
    in_pieces(decoder, new_cache(spec, 17), sizes, None)
    expected, provider.chosen = provider.chosen, []
    in_pieces(decoder, new_cache(spec, 17), sizes, compiled(ISAS[0], decoder))
    for (found_ids, found_weights), (want_ids, want_weights) in zip(
        provider.chosen, expected, strict=True
    ):
        assert found_ids.tolist() == want_ids.tolist()
        torch.testing.assert_close(found_weights, want_weights, rtol=1e-5, atol=1e-7)


def test_experts_whom_nothing_speaks_for_get_no_weight_and_no_nan() -> None:
    """Of a token that every row of the router points away from: all sigmoids are zero."""
    spec = replace(GROUPED, layers=SPEC.layers[:1])
    weights, provider = random_weights(spec), NoExperts()
    run(decoder_of(spec, weights, provider), Batch.of(ids(1), new_cache(spec, 1)))
    weights["layers.0.router"] = -1000 * provider.hidden[0].expand(spec.num_experts, -1).clone()
    decoder = decoder_of(spec, weights, provider)
    for few in (None, compiled(ISAS[0], decoder)):
        run(decoder, Batch.of(ids(1), new_cache(spec, 1)), few)
        assert provider.chosen[-1][1].tolist() == [[0.0] * spec.experts_per_token]


@pytest.mark.parametrize("case", [SPEC, WINDOWS, GROUPED], ids=["plain", "bias", "grouped"])
def test_guesses_are_those_of_the_decoder(isa: str, case: ModelSpec) -> None:
    spec = replace(case, layers=(LayerSpec("full", True, True),) * 3, num_experts=40)
    provider = NoExperts()
    decoder = decoder_of(spec, experts=provider, guesses=5)
    in_pieces(decoder, new_cache(spec, 9), [8, 1], None)
    expected, provider.guessed = provider.guessed, []
    in_pieces(decoder, new_cache(spec, 9), [8, 1], compiled(isa, decoder))
    assert len(expected) == 4
    for found, want in zip(provider.guessed, expected, strict=True):
        assert found.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "router"])
def test_what_is_no_number_does_not_become_one(isa: str, name: str) -> None:
    weights = random_weights(SPEC)
    weights["layers.0.v_proj"] *= 1e-3  # of which a wrong weight makes no overflow
    weights[f"layers.0.{name}"][0, 0] = torch.nan
    provider = NoExperts()
    decoder = decoder_of(SPEC, weights, provider)
    found = run(decoder, Batch.of(ids(1), new_cache(SPEC, 4)), compiled(isa, decoder))
    chosen, weight = provider.chosen[0]
    assert chosen.min() >= 0
    assert chosen.max() < SPEC.num_experts
    assert (weight if name == "router" else found).isnan().any()


def test_a_key_that_is_no_number_shows(isa: str) -> None:
    """Among others that are: those do not hide it. Values are small, so that nothing overflows."""
    weights = random_weights(SPEC)
    weights["layers.0.v_proj"] *= 1e-3
    decoder = decoder_of(SPEC, weights)
    cache = new_cache(SPEC, 40)
    in_pieces(decoder, cache, [30], None)
    cache.storage(0)[0, :, 5] = torch.nan
    assert run(decoder, Batch.of(ids(1), cache), compiled(isa, decoder)).isnan().any()


def test_values_are_rounded_as_torch_rounds_them(isa: str) -> None:
    """Ties go to even, and what is no number stays none: values that are their bias."""
    spec = replace(SPEC, layers=SPEC.layers[:1], attention_bias=True)
    weights = random_weights(spec)
    weights["layers.0.v_proj"].zero_()
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-40, 0.0])
    ties = torch.arange(0x3F800000, 0x3F8FFFFF, 0x8000, dtype=torch.int32)[:26].view(torch.float32)
    weights["layers.0.v_proj.bias"] = torch.cat((odd, ties))
    decoder, cache = decoder_of(spec, weights), new_cache(spec, 2, torch.bfloat16)
    run(decoder, Batch.of(ids(1), cache), compiled(isa, decoder))
    found, expected = cache.storage(0)[1, :, 0], torch.cat((odd, ties)).bfloat16().view(2, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_logit_that_is_no_number_is_chosen_first_as_torch_does() -> None:
    weights = random_weights(CHUNKED)
    weights["layers.0.router"][4, 0] = torch.nan
    provider = NoExperts()
    decoder = decoder_of(CHUNKED, weights, provider)
    for few in (None, compiled(ISAS[0], decoder)):
        run(decoder, Batch.of(ids(8), new_cache(CHUNKED, 8)), few)
    plain, _, found, _ = (chosen for chosen, _ in provider.chosen)
    assert found[:, 0].tolist() == plain[:, 0].tolist() == [4] * 8


def test_what_the_compiled_way_does_not_take() -> None:
    decoder = decoder_of(CHUNKED)
    few, spec = compiled(ISAS[0], decoder), CHUNKED

    def takes(start: int, count: int, dtype: torch.dtype = torch.float32) -> bool:
        cache = KvCache(spec, 40, dtype)
        cache.begin(0, start)
        cache.commit()
        return few.takes(decoder.make_step(Batch.of(ids(count), cache)))

    assert takes(8, 8)
    assert takes(15, 1, torch.bfloat16)
    assert not takes(7, 2), "the second token overwrites what the first looks at"
    assert not takes(8, 9), "more than a few tokens"
    assert takes(8, 1, torch.int8)
    assert not takes(8, 1, torch.float16), "a cache in fp16"
    few, spec = compiled(ISAS[0], decoder_of(WINDOWS)), WINDOWS
    assert takes(0, 8)
    assert takes(30, 1)
    assert not takes(1, 8), "the last token overwrites what the first looks at"


@pytest.mark.parametrize("odd", ["one_quantized", "of_bitsandbytes", "with_gaps"])
def test_weights_that_cannot_be_read_leave_the_plain_way(odd: str) -> None:
    weights: dict[str, Any] = random_weights(SPEC)
    right = decoder_of(SPEC, weights)
    name = "layers.1.k_proj"
    if odd == "one_quantized":
        weights[name] = random_weight(*weights[name].shape, QuantScheme(8, 32), seed=0)
    elif odd == "of_bitsandbytes":
        weights[name] = BnbWeight.of(weights[name], "nf4", "cpu")
    else:
        weights[name] = weights[name].repeat(1, 2)[:, ::2][:, : SPEC.hidden_size]
    assert FewTokens.of(library_of(ISAS[0]), right) is not None
    decoder = decoder_of(SPEC, weights)
    assert FewTokens.of(library_of(ISAS[0]), decoder) is None
    ops.set_backend("cpu")
    assert decoder.forward(Batch.of(ids(1), new_cache(SPEC, 4))).isfinite().all()


def test_the_decoder_takes_the_compiled_way_where_its_kernels_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []
    call = FewTokens.logits

    def counted(self: FewTokens, *arguments: Any) -> Tensor:
        taken.append(ops.current_backend())
        return call(self, *arguments)

    monkeypatch.setattr(FewTokens, "logits", counted)
    decoder = decoder_of(SPEC)
    for backend in ("reference", "torch", "cpu", "auto"):
        ops.set_backend(backend)
        decoder.forward(Batch.of(ids(1), new_cache(SPEC, 4)))
    assert taken == ["cpu", "auto"]
