"""Attention over latents alone: both forms against the plain sum in fp64, and what each costs.

Legend of the shapes: T new tokens, L tokens looked at, N heads, R rank of the latents.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moecli.footprint import tensor_nbytes
from moecli.kv_cache import KvCache
from moecli.models import latent_sizes
from moecli.models.attention import Weight
from moecli.models.config import LatentSpec, LayerSpec, ModelSpec
from moecli.models.latent import LatentAttention, LatentHeads
from moecli.models.latent_sizes import heads_at_once, most_absorbed, workspace_numel
from moecli.models.naming import CheckpointNames
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight
from tests.models.families import FAMILIES
from tests.models.test_models_config import QWEN3
from tests.models.tiny_models import oracle, spec_of

TOLERANCE = 1e-5
HEADS = 6
SHAPES = {
    "plain": LatentSpec(16, 0, nope_size=8, rope_size=4, value_size=8, scale=0.3),
    "values_beyond_keys": LatentSpec(16, 0, nope_size=4, rope_size=4, value_size=14, scale=0.3),
    "keys_beyond_values": LatentSpec(16, 0, nope_size=12, rope_size=6, value_size=2, scale=0.3),
    "rank_below_head": LatentSpec(4, 0, nope_size=8, rope_size=4, value_size=8, scale=0.3),
}
DEEPSEEK_V3 = LatentSpec(512, 1536, nope_size=128, rope_size=64, value_size=128, scale=1.0)


def case(name: str, count: int, length: int) -> tuple[LatentHeads, Tensor, Tensor]:
    """A layer's heads, queries [T, N, K + P] and what is kept [L, R + P]."""
    latent, generator = SHAPES[name], torch.Generator().manual_seed(0)
    rows = latent.nope_size + latent.value_size
    kv_b = torch.randn(HEADS, rows, latent.rank, generator=generator)
    queries = torch.randn(count, HEADS, latent.head_size, generator=generator)
    kept = torch.randn(length, latent.kept_size, generator=generator)
    return LatentHeads(0, "half", latent, kv_b), queries, kept


def plain_sum(heads: LatentHeads, queries: Tensor, kept: Tensor) -> Tensor:
    """[T, N * V] in fp64: every head's keys, scores, weights and values written out."""
    latent, (count, length) = heads.latent, (queries.shape[0], kept.shape[0])
    kept, queries, kv_b = kept.double(), queries.double(), heads.kv_b.double()
    both = torch.einsum("lr,ndr->nld", kept[:, : latent.rank], kv_b)
    shared = kept[:, latent.rank :].expand(HEADS, -1, -1)
    keys = torch.cat((both[..., : latent.nope_size], shared), dim=-1)
    scores = torch.einsum("tnd,nld->ntl", queries, keys) * latent.scale
    later = torch.arange(length) > torch.arange(length - count, length)[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
    values = both[..., latent.nope_size :]
    return torch.einsum("ntl,nlv->tnv", weights, values).flatten(1)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 33), (5, 5), (7, 33), (33, 33)])
@pytest.mark.parametrize("name", SHAPES)
def test_both_forms_are_the_plain_sum(name: str, count: int, length: int) -> None:
    heads, queries, kept = case(name, count, length)
    expected = plain_sum(heads, queries, kept)
    assert expected.std() > 0.3, "too flat to tell anything"
    for form in (heads.absorbed, heads.expanded, heads.attend):
        found = form(queries, kept)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= TOLERANCE, form.__name__


@pytest.mark.parametrize("budget", [1, 33 * 40 * 2, 33 * 40 * 4])
def test_heads_are_expanded_some_at_a_time(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """One, two and four of six heads at once: the last time fewer."""
    monkeypatch.setattr(latent_sizes, "_EXPANDED_NUMEL", budget)
    heads, queries, kept = case("plain", 7, 33)
    assert heads_at_once(heads.latent, HEADS, 33) == max(1, budget // (33 * 40))
    found = heads.expanded(queries, kept)
    assert (found - plain_sum(heads, queries, kept)).abs().max() <= TOLERANCE


def test_the_cheaper_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for form in ("absorbed", "expanded"):
        monkeypatch.setattr(LatentHeads, form, lambda *_, name=form: taken.append(name))
    heads, queries, kept = case("plain", 20, 100)
    few = most_absorbed(heads.latent, 100)
    assert 1 < few < 20
    for count in (1, few, few + 1, 20):
        heads.attend(queries[:count], kept)
    assert taken == ["absorbed", "absorbed", "expanded", "expanded"]


@pytest.mark.parametrize("length", [10, 171, 4096, 131072])
@pytest.mark.parametrize("name", SHAPES)
def test_up_to_so_many_tokens_absorbing_takes_fewer_products(name: str, length: int) -> None:
    latent = SHAPES[name]

    def absorbed(count: int) -> int:
        matrix = latent.rank * (latent.nope_size + latent.value_size)
        return count * (2 * latent.kept_size * length + matrix)

    def expanded(count: int) -> int:
        matrix = latent.rank * (latent.nope_size + latent.value_size)
        return 2 * latent.padded_size * count * length + length * matrix

    few = most_absorbed(latent, length)
    assert 0 <= few <= length
    assert all(absorbed(n) <= expanded(n) for n in {1, few} if 0 < n <= few)
    assert few == length or absorbed(few + 1) > expanded(few + 1)


def test_deepseek_v3_absorbs_a_token_and_expands_a_chunk_of_prompt() -> None:
    for length in (1024, 16384, 131072):
        assert 1 <= most_absorbed(DEEPSEEK_V3, length) < 512
    assert most_absorbed(DEEPSEEK_V3, 1 << 20) == 170


def test_a_bfloat16_cache_is_attended_to_in_its_own_numbers() -> None:
    """Queries are rounded once as well, and nothing else: as much as the other caches do."""
    for count in (1, 20):
        heads, queries, kept = case("plain", count, 33)
        expected = plain_sum(heads, queries, kept.bfloat16())
        found = heads.attend(queries, kept.bfloat16())
        assert (found - expected).pow(2).mean().sqrt() < 0.02 * expected.std()


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up what new tensors take, as if none were ever freed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("count", [1, 20, 200])
@pytest.mark.parametrize("length", [200, 3000])
def test_no_tensor_is_larger_than_the_workspace_that_is_planned(count: int, length: int) -> None:
    """Scores of all heads, or keys of all heads at a long context, would be."""
    heads, queries, kept = case("plain", count, length)
    planned = workspace_numel(heads.latent, HEADS, count, length)
    with Counting() as counting:
        heads.attend(queries, kept)
    assert counting.largest <= 4 * planned
    assert planned <= workspace_numel(heads.latent, HEADS, count + 1, length + 1)


def test_a_quantized_matrix_is_held_in_the_dtype_of_computing() -> None:
    """As the plan counts it; the decoder's other linears stay as they are stored."""
    model = oracle("deepseek_v3", **FAMILIES["deepseek_v3"].wide)
    spec, tensors = spec_of(model), model.state_dict()
    known = CheckpointNames(spec, tensors)
    linears = {tensor.name: tensor for tensor in spec.dense_tensors if tensor.linear}

    def weights(name: str) -> Weight:
        weight = tensors[known.tensor(name)]
        return quantize(weight, QuantScheme(8, 32)) if name in linears else weight

    attention = LatentAttention(spec, 0, weights, torch.float32)
    stored = weights("layers.0.kv_b_proj")
    assert torch.equal(attention.heads.kv_b.flatten(0, 1), dequantize(stored))
    planned = tensor_nbytes(linears["layers.0.kv_b_proj"], QuantScheme(8, 32))
    assert attention.heads.kv_b.nbytes == planned
    assert isinstance(attention.q_up, QuantizedWeight)


def latent_cache(ctx: int, dtype: torch.dtype = torch.float32) -> KvCache:
    spec = ModelSpec.from_hf(QWEN3)
    layers = (LayerSpec("latent", True, True),) * 2
    return KvCache(replace(spec, layers=layers, latent=SHAPES["plain"]), ctx, dtype)


def test_a_cache_of_latents_keeps_one_vector_a_token_and_layer() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert latent_cache(100, dtype).nbytes == 2 * 100 * 20 * dtype.itemsize
    with pytest.raises(AssertionError, match="latents in int8"):
        latent_cache(100, torch.int8)


def test_what_a_cache_of_latents_gives_back() -> None:
    cache, latents = latent_cache(10), torch.randn(10, 20)
    cache.begin(0, 6)
    for layer in range(2):
        assert torch.equal(cache.append_latents(layer, 0, latents[:6] + layer), latents[:6] + layer)
    cache.commit()
    assert cache.truncate(3) == 3
    cache.begin(3, 2)
    kept = cache.append_latents(0, 3, latents[8:])
    assert torch.equal(kept, torch.cat((latents[:3], latents[8:])))
    assert torch.equal(cache.append_latents(1, 3, latents[8:])[:3], latents[:3] + 1)
