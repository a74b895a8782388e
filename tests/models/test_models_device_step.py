"""One token at a time on a device: DeviceStep against the ragged batch, eagerly and as a graph."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models import device_step, fused
from moecli.models.attention import mask_by_name, mask_by_view
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.device_step import num_splits
from tests.graphs import SimulatedGraph
from tests.models.stacked_experts import StackedExperts
from tests.models.tiny_models import decoder_of, logits_in_steps, oracle, spec_of, tokens

TOLERANCE = 1e-5
LENGTH = 21  # two chunks of 8 and a rest
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
VARIANTS = {
    "llama4": ("llama4", {}),
    "maverick": ("llama4", {"interleave_moe_layer_step": 2, "use_qk_norm": False}),
    "llama4_odd": (
        "llama4",
        {"attention_chunk_size": 5, "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama4_top2_bias": ("llama4", {"num_experts_per_tok": 2, "attention_bias": True}),
    "qwen3": ("qwen3_moe", {}),
    "qwen3_tied": ("qwen3_moe", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama4_short": (
        "llama4",
        {"num_hidden_layers": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 5},
    ),
    "qwen3_short": ("qwen3_moe", {"num_hidden_layers": 2}),
    "mixtral": ("mixtral", {}),
    "glm4": ("glm4_moe", {"n_group": 4, "topk_group": 2, "use_qk_norm": True}),
    "glm4_short": ("glm4_moe", {"num_hidden_layers": 2}),
    "glm4_plain": ("glm4_moe", {"attention_bias": False, "first_k_dense_replace": 0}),
    "mixtral_window": ("mixtral", {"sliding_window": 5}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss_window_of_1": ("gpt_oss", {"sliding_window": 1}),
    "gpt_oss_window_of_5": ("gpt_oss", {"sliding_window": 5, "num_key_value_heads": 4}),
    "gpt_oss_short": ("gpt_oss", {"num_hidden_layers": 2, "sliding_window": 5}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3_odd": ("deepseek_v3", {"q_lora_rank": None, "v_head_dim": 14, "kv_lora_rank": 4}),
    "deepseek_v3_yarn": ("deepseek_v3", {"rope_parameters": YARN_ROPE, "attention_bias": True}),
    "deepseek_v2": ("deepseek_v2", {"rope_parameters": YARN_ROPE}),
    "deepseek_v3_short": ("deepseek_v3", {"num_hidden_layers": 2}),
}
# The interpreter of the kernels is slow: 50 ms a layer and token.
CASES = [(name, "reference", range(LENGTH)) for name in VARIANTS]
CASES += [("llama4_odd", "triton", range(3, 7)), ("qwen3_short", "triton", range(4))]
CASES += [("glm4_short", "triton", range(4)), ("deepseek_v3_short", "triton", range(6, 9))]
CASES += [("gpt_oss_short", "triton", range(3, 7))]
CAPTURES = [
    (name, "reference", at, LENGTH)
    for name in ("llama4", "qwen3", "glm4", "gpt_oss", "deepseek_v3")
    for at in (0, 3, 7, 8)
]
CAPTURES += [("llama4_short", "triton", 4, 12), ("qwen3_short", "triton", 6, 9)]
CAPTURES += [("gpt_oss_short", "triton", 3, 8), ("deepseek_v3_short", "triton", 6, 9)]


def decoder(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    family, changes = VARIANTS[name]
    model = oracle(family, **changes)
    num_experts = spec_of(model).num_experts
    return decoder_of(model, dtype, wrap=lambda experts: StackedExperts(experts, num_experts))


@functools.cache
def case(name: str) -> tuple[Decoder, Tensor, Tensor]:
    """A decoder, tokens, and the logits of all of them at once."""
    found, ids = decoder(name), tokens(LENGTH)
    expected = logits_in_steps(found, ids, [LENGTH])
    assert expected.std() > 0.3, "logits too flat to tell a broken model"
    return found, ids, expected


@pytest.fixture
def backend(request):
    fused.set_backend(request.param)
    yield request.param
    fused.set_backend("auto")


@pytest.fixture
def small_splits(monkeypatch):
    """Attention over more than seven slots is split."""
    monkeypatch.setattr(device_step, "SPLIT_SLOTS", 7)


def new_cache(decoder: Decoder, dtype: torch.dtype = torch.float32) -> KvCache:
    """With numbers in it that nobody may look at."""
    cache = KvCache(decoder.spec, LENGTH, dtype)
    for layer in range(decoder.spec.num_layers):
        cache.storage(layer).fill_(torch.nan)
    return cache


def after_prompt(decoder: Decoder, ids: Tensor, dtype: torch.dtype = torch.float32) -> KvCache:
    """A cache that holds these tokens, computed all at once by plain PyTorch."""
    cache, backend = new_cache(decoder, dtype), fused.current_backend()
    fused.set_backend("reference")
    if len(ids):
        decoder.forward(Batch.of(ids, cache))
    fused.set_backend(backend)
    return cache


def step_by_step(decoder: Decoder, ids: Tensor, cache: KvCache) -> Tensor:
    """Logits [n, V] of tokens that follow what the cache holds."""
    found = []
    for token in ids:
        position = torch.tensor([cache.length])
        cache.begin(cache.length, 1)
        found.append(decoder.decode(token[None], position, cache))
        cache.commit()
    return torch.cat(found)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return (found - expected).abs().max().nan_to_num(torch.inf).item()


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(("name", "backend", "places"), CASES, indirect=["backend"])
def test_token_by_token(name, backend, places):
    decoder, ids, expected = case(name)
    cache = after_prompt(decoder, ids[: places[0]])
    found = step_by_step(decoder, ids[places], cache)
    assert difference(found, expected[places]) <= TOLERANCE


@pytest.mark.parametrize("prompt", [1, 7, 8, 12])
@pytest.mark.parametrize("name", ["llama4", "qwen3", "gpt_oss", "deepseek_v3"])
def test_a_prompt_before_and_a_batch_after(name, prompt):
    """Both ways to compute read and write the same cache."""
    decoder, ids, expected = case(name)
    cache = new_cache(decoder)
    first = logits_in_steps(decoder, ids[:prompt], [prompt], cache)
    middle = step_by_step(decoder, ids[prompt:18], cache)
    last = decoder.forward(Batch.of(ids[18:], cache, all_logits=True))
    assert difference(torch.cat((first, middle, last)), expected) <= TOLERANCE


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(("name", "backend", "captured_at", "end"), CAPTURES, indirect=["backend"])
def test_a_graph_captured_once_is_right_at_every_position(name, backend, captured_at, end):
    """Across the borders between chunks; the replays begin where the capture was."""
    decoder, ids, expected = case(name)
    cache = after_prompt(decoder, ids[:captured_at])
    token, position = ids[captured_at : captured_at + 1].clone(), torch.tensor([captured_at])
    graph = SimulatedGraph()
    with graph.capture():
        logits = decoder.decode(token, position, cache)
    for place in range(captured_at, end):
        cache.begin(place, 1)
        token.copy_(ids[place : place + 1])
        position.fill_(place)
        graph.replay()
        cache.commit()
        assert difference(logits, expected[place : place + 1]) <= TOLERANCE, place
    fused.set_backend("reference")
    rest = cache.truncate(end - 1)
    again = decoder.forward(Batch.of(ids[rest:], cache, all_logits=True))
    assert difference(again, expected[rest:]) <= TOLERANCE, "what the replays stored"


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama4_short", "qwen3_short"])
def test_half_precision_stays_near_the_batch(name, dtype, backend):
    """Over a bfloat16 cache; the interpreter cuts off where devices round."""
    places = range(7, 10)
    expected = case(name)[2][places]
    half, ids = decoder(name, dtype), tokens(LENGTH)
    cache = after_prompt(half, ids[: places[0]], torch.bfloat16)
    found = step_by_step(half, ids[places], cache)
    allowed = 0.15 if backend == "triton" else 0.05
    assert (found - expected).pow(2).mean().sqrt() < allowed * expected.std()


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_the_embedding_may_lie_where_only_its_address_is_known(backend):
    plain, ids, expected = case("qwen3")
    table = plain.embedding.table
    elsewhere = decoder("qwen3")
    elsewhere.embedding = type(plain.embedding)(
        torch.full_like(table, torch.nan), table.data_ptr(), elsewhere.device, torch.float32
    )
    found = logits_in_steps(elsewhere, ids[:5], [5])
    assert difference(found, expected[:5]) <= TOLERANCE


class Ordered:
    """Experts, and a shared expert, that note what happens when."""

    def __init__(self, experts, shared):
        self.experts, self.shared, self.events = experts, shared, []

    def begin(self, *args):
        self.events.append("begin")
        self.value = self.experts.begin(*args).result()
        return self

    def result(self):
        self.events.append("result")
        return self.value

    def __call__(self, x):
        self.events.append("shared")
        return self.shared(x)


def test_the_shared_expert_is_computed_while_routed_experts_are_under_way():
    found = decoder("llama4")
    block = found.layers[0].mlp
    order = Ordered(block.experts, block.shared)
    block.experts = block.shared = order
    logits = step_by_step(found, tokens(LENGTH)[:3], new_cache(found))
    assert order.events == ["begin", "shared", "result"] * 3
    assert difference(logits, case("llama4")[2][:3]) <= TOLERANCE


def test_a_captured_step_makes_no_guesses():
    """The host would have to look at them; StackedExperts raises when it gets one."""
    model = oracle("llama4")
    guessing = decoder_of(model, wrap=lambda experts: StackedExperts(experts, 4), guesses=2)
    assert guessing.layers[0].lookahead is not None
    step_by_step(guessing, tokens(1), new_cache(guessing))
    with pytest.raises(AssertionError, match="cannot guess"):
        logits_in_steps(guessing, tokens(1), [1])


@pytest.mark.parametrize(
    "name", ["llama4", "llama4_top2_bias", "qwen3", "gpt_oss", "deepseek_v3", "glm4"]
)
def test_everything_is_made_on_the_device_of_the_weights(name):
    """A device without numbers: an operation on it and on main memory at once would be refused."""
    family, changes = VARIANTS[name]
    here = decoder_of(oracle(family, **changes))
    tensors: dict[str, Tensor] = {}
    plain = Decoder.__init__

    def to_meta(self, spec, weights, experts, dtype, guesses):
        def meta(name):
            return tensors.setdefault(name, weights(name).to("meta"))

        experts = StackedExperts(experts, spec.num_experts)
        experts.biases = {layer: bias.to("meta") for layer, bias in experts.biases.items()}
        gate, down = (
            torch.empty(spec.num_experts, *shape, device="meta")
            for shape in (
                (spec.expert_intermediate_size, spec.hidden_size),
                (spec.hidden_size, spec.expert_intermediate_size),
            )
        )
        experts.stacks = dict.fromkeys(spec.moe_layers, (gate, gate, down))
        plain(self, spec, meta, experts, dtype, guesses, device="meta")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__init__", to_meta)
        there = decoder_of(oracle(family, **changes))
    assert here.device.type == "cpu"
    cache = KvCache(there.spec, LENGTH, device="meta")
    for size in (6, 3, 1, 11):  # from the beginning, after something, one, across borders
        logits = there.forward(Batch.of(tokens(size), cache, all_logits=True))
        assert (logits.device.type, logits.shape) == ("meta", (size, 97))
    cache.truncate(16)
    token, position = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    assert there.decode(token, position, cache).shape == (1, 97)


@pytest.mark.parametrize(("count", "length"), [(2, 7), (5, 6), (1, 3)])
def test_both_ways_to_mask_see_the_same(count, length):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(2, 3, count, 8, generator=generator)
    keys, values = torch.randn(2, 2, 3, length, 8, generator=generator)
    scores = rows @ keys.transpose(-1, -2) / 8**0.5
    later = torch.arange(length) > torch.arange(length - count, length)[:, None]
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
    for masked in (mask_by_view, mask_by_name):
        assert torch.allclose(masked(rows, keys, values), expected, atol=1e-6), masked


def test_the_way_without_a_device_imports_no_triton():
    """Nor torch._dynamo, which would double the time until the first token."""
    code = "import sys, moecli.models.decoder; print('triton' in sys.modules or 'torch._dynamo' in "
    code += "sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_splits_are_as_many_as_the_capacity_is_worth():
    cpu = torch.device("cpu")
    assert [num_splits(n, 8, cpu) for n in (1, 256, 257, 1 << 20)] == [1, 1, 2, 2]
    assert [num_splits(n, 1, cpu) for n in (1, 256, 257, 1 << 20)] == [1, 1, 2, 16]


def test_a_ring_smaller_than_a_chunk():
    """A context that ends within the first chunk: the ring has as many slots as the context."""
    decoder, ids, expected = case("llama4")
    cache = KvCache(replace(decoder.spec), 6, torch.float32)
    found = step_by_step(decoder, ids[:6], cache)
    assert difference(found, expected[:6]) <= TOLERANCE
