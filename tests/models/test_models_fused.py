"""The operations between matrix products: kernels against references, references against fp64."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecli.errors import MoecliError
from moecli.models import fused
from tests.devices import DEVICE, examples
from tests.triton_compile import compiling, run_python

# Relative to the largest number; the interpreter cuts off where devices round to bfloat16, up to
# four times in a row.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4 * 2**-7, torch.float16: 4 * 2**-11}
DTYPES = st.sampled_from(list(TOLERANCE))
QUICK = settings(max_examples=examples(25), deadline=None)


@pytest.fixture(autouse=True)
def _restore_backend():
    yield
    fused.set_backend("auto")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(1.0, expected.double().abs().max().item())


def both(function, *args):
    """What the reference and the kernel give, each for a copy of the arguments of its own."""
    results = []
    for backend in ("reference", "triton"):
        fused.set_backend(backend)
        own = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        results.append((function(*own), own))
    return results


@QUICK
@given(
    rows=st.integers(0, 5),
    size=st.integers(1, 70),
    weight_rows=st.sampled_from([0, 1, 3]),
    dtype=DTYPES,
)
def test_rms_norm(rows, size, weight_rows, dtype):
    x = 3 * random(rows, 3, size, dtype=dtype)
    weight = None if weight_rows == 0 else random(weight_rows, size, dtype=dtype, seed=1)
    if weight_rows == 1:
        weight = weight[0]
    (expected, _), (found, _) = both(fused.rms_norm, x, weight, 1e-5)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = exact if weight is None else exact * weight.double()
    if rows:
        assert_close(expected, exact.to(dtype), dtype)
        assert_close(found, expected, dtype)


def test_eps_counts():
    x = torch.full((1, 8), 1e-3, device=DEVICE)
    for found, _ in both(fused.rms_norm, x, None, 1e-6):
        assert found[0, 0].item() == pytest.approx(0.5**0.5, rel=1e-5)


@QUICK
@given(rows=st.integers(1, 4), size=st.integers(1, 70), dtype=DTYPES)
def test_add_rms_norm_adds_in_place(rows, size, dtype):
    residual, delta = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype, seed=1)
    weight = random(size, dtype=dtype, seed=2)
    total = residual + delta
    for found, (changed, unchanged, *_) in both(fused.add_rms_norm, residual, delta, weight, 1e-5):
        assert_close(changed, total, dtype)
        assert torch.equal(unchanged, delta)
        assert_close(found, fused._rms_norm(changed, weight, 1e-5), dtype)


@QUICK
@given(shape=st.tuples(st.integers(0, 3), st.integers(1, 1500)), dtype=DTYPES)
def test_silu_mul(shape, dtype):
    gate, up = 4 * random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    (expected, _), (found, _) = both(fused.silu_mul, gate, up)
    assert torch.equal(expected, torch.nn.functional.silu(gate) * up)
    if shape[0]:
        assert_close(found, expected, dtype)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter, in exp
def test_silu_of_extremes_is_finite():
    gate = torch.tensor([[-200.0, 200.0, 0.0]], device=DEVICE)
    for found, _ in both(fused.silu_mul, gate, torch.ones_like(gate)):
        assert found.tolist() == [[0.0, 200.0, 0.0]]


@QUICK
@given(
    tokens=st.integers(0, 3),
    num_experts=st.sampled_from([1, 3, 16, 40, 130]),
    share=st.floats(0, 1),
    kind=st.sampled_from(["sigmoid", "softmax", "softmax_of_chosen"]),
    normalize=st.booleans(),
    dtype=DTYPES,
)
def test_choose_experts(tokens, num_experts, share, kind, normalize, dtype):
    """Logits of a token all differ: which of two equals comes first is nobody's promise."""
    top_k = 1 + round(share * (min(num_experts, 10) - 1))
    order = random(tokens, num_experts).argsort(-1)
    logits = ((order - num_experts // 2) / 4).to(dtype)
    (expected, _), (found, _) = both(fused.choose_experts, logits, top_k, kind, normalize)
    assert torch.equal(found[0], expected[0])
    weights = logits.double().sigmoid() if kind == "sigmoid" else logits.double().softmax(-1)
    exact = weights.gather(1, found[0])
    whole = normalize or kind == "softmax_of_chosen"
    exact = exact / exact.sum(-1, keepdim=True) if whole else exact
    for weights in (expected[1], found[1]):
        assert weights.dtype == dtype
        if tokens:
            assert_close(weights.double(), exact, dtype)


def test_experts_far_below_the_best_are_still_told_apart():
    """Their weights are all nothing in fp32, and yet one is wanted more than the others."""
    logits = torch.tensor([[300.0, -3.0, -1.0, -2.0]], device=DEVICE)
    fused.set_backend("triton")
    for kind in ("softmax", "softmax_of_chosen"):
        ids, weights = fused.choose_experts(logits, 3, kind, False)
        assert ids.tolist() == [[0, 2, 3]]
        assert weights.tolist() == [[1.0, 0.0, 0.0]]


def test_equal_logits_choose_distinct_experts():
    logits = torch.zeros(1, 6, device=DEVICE)
    for (ids, weights), _ in both(fused.choose_experts, logits, 4, "softmax", False):
        assert len(set(ids.tolist()[0])) == 4
        assert torch.allclose(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter
@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "softmax_of_chosen"])
def test_what_is_no_number_chooses_experts_that_exist(kind):
    logits = torch.full((2, 5), torch.nan, device=DEVICE)
    for (ids, _), _ in both(fused.choose_experts, logits, 3, kind, True):
        assert ids.min() >= 0
        assert ids.max() < 5


@QUICK
@given(size=st.integers(1, 1100), ids=st.lists(st.integers(0, 8), max_size=4), dtype=DTYPES)
def test_gather_rows(size, ids, dtype):
    table = random(9, size, dtype=dtype)
    address = torch.tensor([table.data_ptr()], device=DEVICE)
    wanted = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    backends = ("triton",) if DEVICE == "cuda" else ("reference", "triton")
    for backend in backends:
        fused.set_backend(backend)
        assert torch.equal(fused.gather_rows(address, wanted, size, dtype), table[wanted])


@QUICK
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (6, 6)]),
    half=st.integers(1, 20),
    turning=st.floats(0, 1),
    rope=st.sampled_from(["interleaved", "half", "none"]),
    norm=st.sampled_from(["before", "after", "none"]),
    weighted=st.booleans(),
    tempered=st.booleans(),
    slot=st.integers(0, 6),
    dtypes=st.tuples(DTYPES, st.sampled_from([torch.float32, torch.bfloat16])),
)
def test_rotate_and_store(heads, half, turning, rope, norm, weighted, tempered, slot, dtypes):
    """RoPE turns all components of a head or the first ones alone."""
    (num_heads, kv_heads), (dtype, cache_dtype) = heads, dtypes
    q, k, v = (
        random(1, count, 2 * half, dtype=dtype, seed=i)
        for i, count in enumerate((num_heads, kv_heads, kv_heads))
    )
    pairs = max(1, round(turning * half))
    turns = torch.polar(torch.full((1, pairs), 1.1), 3 * random(1, pairs).cpu()).to(DEVICE)
    temperature = torch.full((1, 1, 1), 1.7, device=DEVICE) if tempered else None
    weight = random(num_heads + kv_heads, 2 * half, dtype=dtype, seed=4) if weighted else None
    cache = random(2, kv_heads, 7, 2 * half, dtype=cache_dtype, seed=5)
    rules = (turns, temperature, weight, rope, norm, 1e-5, torch.tensor([slot], device=DEVICE))
    results = both(fused.rotate_and_store, q, k, v, *rules, cache)
    (expected, (*_, expected_cache)), (found, (*_, found_cache)) = results
    looser = max((dtype, cache_dtype), key=TOLERANCE.__getitem__)
    assert_close(found, expected, looser)
    assert_close(found_cache, expected_cache, looser)
    assert torch.equal(expected_cache[1, :, slot], v[0].to(cache_dtype))
    if dtype == cache_dtype:
        assert torch.equal(found_cache[1, :, slot], v[0])
    others = [i for i in range(7) if i != slot]
    for changed in (expected_cache, found_cache):
        assert torch.equal(changed[:, :, others], cache[:, :, others])


def exact_softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights [N, L] of scores fp64 [N, L], of which a sink [N] takes a part."""
    if sinks is None:
        return scores.softmax(-1)
    return torch.cat((scores, sinks.double()[:, None]), dim=-1).softmax(-1)[:, :-1]


def exact_attention(
    q: Tensor, keys_values: Tensor, length: int, sinks: Tensor | None = None
) -> Tensor:
    """[N * D] in fp64."""
    group = q.shape[1] // keys_values.shape[1]
    keys, values = keys_values[:, :, :length].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,hld->hl", q[0].double(), keys) / math.sqrt(q.shape[2])
    return torch.einsum("hl,hld->hd", exact_softmax(scores, sinks), values).flatten()


@settings(max_examples=examples(60), deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (3, 3), (20, 1)]),
    size=st.sampled_from([8, 16, 20]),
    capacity=st.integers(1, 300),
    place=st.floats(0, 1),
    splits=st.sampled_from([1, 2, 3, 5]),
    with_sinks=st.booleans(),
    dtypes=st.tuples(DTYPES, st.sampled_from([torch.float32, torch.bfloat16])),
)
def test_decode_attention(heads, size, capacity, place, splits, with_sinks, dtypes):
    """At any length; what lies beyond it is never looked at, not even if it is no number."""
    (num_heads, kv_heads), (dtype, cache_dtype) = heads, dtypes
    length = 1 + round(place * (capacity - 1))
    q = 3 * random(1, num_heads, size, dtype=cache_dtype)
    keys_values = random(2, kv_heads, capacity, size, dtype=cache_dtype, seed=1)
    keys_values[:, :, length:] = torch.nan
    sinks = 4 * random(num_heads, seed=2) if with_sinks else None
    exact = exact_attention(q, keys_values, length, sinks)[None]
    looser = max((dtype, cache_dtype), key=TOLERANCE.__getitem__)
    args = (q, keys_values, torch.tensor([length], device=DEVICE), splits, dtype, sinks)
    for found, _ in both(fused.decode_attention, *args):
        assert found.dtype == dtype
        assert_close(found.double(), exact, looser)


@pytest.mark.parametrize("sink", [-300.0, 0.0, 300.0])
def test_a_sink_far_above_or_below_the_scores(sink):
    q, keys_values = random(1, 2, 16), random(2, 1, 40, 16, seed=1)
    sinks, length = torch.full((2,), sink, device=DEVICE), torch.tensor([40], device=DEVICE)
    exact = exact_attention(q, keys_values, 40, sinks)[None]
    for found, _ in both(fused.decode_attention, q, keys_values, length, 3, torch.float32, sinks):
        assert_close(found.double(), exact, torch.float32)
    keys, values = keys_values
    for found, _ in both(fused.windowed_attention, q, keys, values, None, sinks):
        assert_close(found.double(), exact, torch.float32)


@settings(max_examples=examples(20), deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (3, 3)]),
    size=st.sampled_from([8, 16, 20]),
    count=st.integers(1, 90),
    before=st.integers(0, 90),
    window=st.none() | st.integers(1, 100),
    with_sinks=st.booleans(),
    gap=st.integers(0, 5),
    dtype=DTYPES,
)
def test_windowed_attention(heads, size, count, before, window, with_sinks, gap, dtype):
    """Of the last tokens of some, whose heads may lie apart in a cache."""
    (num_heads, kv_heads), length = heads, before + count
    q = 3 * random(count, num_heads, size, dtype=dtype)
    kept = random(2, kv_heads, length + gap, size, dtype=dtype, seed=1)
    kept[:, :, length:] = torch.nan
    sinks = 4 * random(num_heads, seed=2) if with_sinks else None
    exact = []
    for row in range(count):
        end = before + row + 1
        begin = 0 if window is None else max(0, end - window)
        exact.append(exact_attention(q[row][None], kept[:, :, begin:], end - begin, sinks))
    keys, values = kept[:, :, :length]
    for found, _ in both(fused.windowed_attention, q, keys, values, window, sinks):
        assert found.dtype == dtype
        assert_close(found.double(), torch.stack(exact), dtype)


def test_plain_attention_takes_its_rows_in_parts(monkeypatch):
    q, (keys, values) = random(9, 4, 8), random(2, 2, 12, 8, seed=1)
    sinks = random(4, seed=2)
    fused.set_backend("reference")
    whole = fused.windowed_attention(q, keys, values, 5, sinks)
    monkeypatch.setattr(fused, "_SCORES_NBYTES", 4 * 4 * 12 * 2)  # of two rows
    assert_close(fused.windowed_attention(q, keys, values, 5, sinks), whole, torch.float32)


@settings(max_examples=examples(20), deadline=None)
@given(
    num_heads=st.sampled_from([1, 4, 16, 20]),
    sizes=st.sampled_from([(16, 8), (20, 4), (32, 16), (4, 6)]),
    capacity=st.integers(1, 150),
    place=st.floats(0, 1),
    splits=st.sampled_from([1, 2, 5]),
    dtypes=st.tuples(DTYPES, st.sampled_from([torch.float32, torch.bfloat16])),
)
def test_decode_latents(num_heads, sizes, capacity, place, splits, dtypes):
    """One key of rank and rest for all heads, and the rank of it as their value."""
    (rank, rest), (dtype, cache_dtype) = sizes, dtypes
    length, scale = 1 + round(place * (capacity - 1)), 0.3
    q = random(1, num_heads, rank + rest, dtype=cache_dtype)
    latents = random(capacity, rank + rest, dtype=cache_dtype, seed=1)
    latents[length:] = torch.nan
    seen = latents[:length].double()
    exact = ((q[0].double() @ seen.mT * scale).softmax(-1) @ seen[:, :rank])[None]
    looser = max((dtype, cache_dtype), key=TOLERANCE.__getitem__)
    args = (q, latents, torch.tensor([length], device=DEVICE), splits, rank, scale, dtype)
    for found, _ in both(fused.decode_latents, *args):
        assert found.dtype == dtype
        assert_close(found.double(), exact, looser)


def test_attention_to_one_key_far_above_the_others():
    """Scores of several hundred: the splits before and after it count for nothing."""
    keys_values = random(2, 1, 200, 16)
    keys_values[0, 0, 70] = 100.0
    q = torch.full((1, 2, 16), 10.0, device=DEVICE)
    length = torch.tensor([200], device=DEVICE)
    for found, _ in both(fused.decode_attention, q, keys_values, length, 3, torch.float32):
        assert torch.equal(found.view(2, 16), keys_values[1, 0, 70].expand(2, 16))


def test_the_backend_is_chosen_by_name():
    assert fused.current_backend() == "auto"
    with pytest.raises(MoecliError, match="no kernels are called `fast`"):
        fused.set_backend("fast")
    fused.set_backend("triton")
    assert fused.current_backend() == "triton"


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without")
def test_kernels_without_a_device_are_refused_in_words(monkeypatch):
    from moecli.models.kernels import rows

    monkeypatch.setattr(rows, "INTERPRETED", False)
    fused.set_backend("triton")
    with pytest.raises(MoecliError, match="need a CUDA device"):
        fused.silu_mul(torch.ones(1), torch.ones(1))
    fused.set_backend("auto")
    assert fused.silu_mul(torch.zeros(1), torch.ones(1)).item() == 0


@pytest.mark.parametrize(
    "name",
    [
        *("rms_norm", "add_rms_norm", "silu_mul", "choose_experts"),
        *("rotate_and_store", "decode_attention", "decode_latents", "windowed_attention"),
    ],
)
def test_shape_functions_and_schemas(name):
    """opcheck: outputs are new, what is written is declared, fake tensors get the right shapes."""
    x, weight = random(3, 8), random(8)
    q, kv = random(1, 4, 8), random(1, 2, 8)
    turns = torch.polar(torch.ones(1, 4), random(1, 4).cpu()).to(DEVICE)
    length = torch.tensor([2], device=DEVICE)
    cache = random(2, 2, 5, 8, dtype=torch.bfloat16)
    args = {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, x + 1, weight, 1e-5),
        "silu_mul": (x, x + 1),
        "choose_experts": (x, 3, "softmax", True),
        "rotate_and_store": (q, kv, kv, turns, None, None, "half", "none", 0.0, length, cache),
        "decode_attention": (q.bfloat16(), cache, length, 2, torch.float32, random(4)),
        "decode_latents": (q, random(5, 8), length, 2, 6, 0.3, torch.float32),
        "windowed_attention": (random(3, 4, 8), *random(2, 2, 5, 8), 2, random(4)),
    }
    tests = ("test_schema", "test_faketensor")
    for backend in ("reference", "triton"):
        fused.set_backend(backend)
        op = getattr(torch.ops.moecli, name).default
        torch.library.opcheck(op, args[name], test_utils=tests)


def compile_all() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """PTX and spilled bytes for each GPU: attention of Llama 4 Scout, routing of Qwen3, prompts of
    gpt-oss, latents of DeepSeek-V3."""
    from moecli.models.kernels import heads, latents, prompt, rows

    cache, queries = torch.zeros(2, 8, 8192, 128).bfloat16(), torch.zeros(1, 40, 128).bfloat16()
    found = {}
    for capability in (75, 86, 120):
        with compiling(capability) as programs:
            heads.decode_attention(queries, cache, torch.tensor([1]), 32, torch.bfloat16, None)
            rows.choose_experts(torch.zeros(1, 128).bfloat16(), 8, "softmax", True)
            prompt.windowed_attention(
                torch.zeros(512, 64, 64).bfloat16(), *torch.zeros(2, 8, 1024, 64).bfloat16(),
                128, torch.zeros(64),
            )  # fmt: skip
            latents.decode_latents(
                torch.zeros(1, 128, 576).bfloat16(), torch.zeros(4096, 576).bfloat16(),
                torch.tensor([1]), 16, 512, 0.1, torch.bfloat16,
            )  # fmt: skip
        found[str(capability)] = (programs, programs.spilled)
    return found


def test_kernels_compile_and_attention_has_matrix_units_where_there_are_some(tmp_path: Path):
    found = run_python(compile_all, tmp_path, interpret=False)
    for capability, (programs, spilled) in found.items():
        print(capability, spilled)
        for name in ("_attend_kernel", "_attend_many_kernel", "_attend_latents_kernel"):
            assert ("mma.sync" in programs[name]) == (int(capability) >= 80), name
        assert not any(spilled.values()), spilled
        assert "bar.sync" not in programs["_choose_experts_kernel"]
