"""A long context on layers that keep one chunk of it, against the library without any cache.

MOECLI_SOAK=1 (`make soak`) takes 200,000 tokens and chunks of 8192, as Llama 4 has them, instead of
a fiftieth of both.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.conversion import quantize_model
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from quant.scheme import QuantScheme
from tests.e2e import tiny
from tests.models.tiny_models import decoder_of, oracle, tokens

SOAK = bool(os.environ.get("MOECLI_SOAK"))
LENGTH, CHUNK = (200_000, 8192) if SOAK else (4_000, 163)
LAST = 32  # logits compared; so many tokens arrive one by one
BLOCK = 256  # queries that the reference looks at together
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

# Two layers in chunks, the third sees all, without RoPE, its queries tempered by their positions.
SIZES = {
    "num_hidden_layers": 3,
    "no_rope_layers": [1, 1, 0],
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "attention_chunk_size": CHUNK,
    "floor_scale": CHUNK,
    "attn_scale": 0.1,
    "max_position_embeddings": LENGTH,
}


def blockwise(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: object
) -> tuple[Tensor, None]:
    """Attention over all keys at once, [1, N, T, D], by absolute positions; no cache, no ring."""
    assert mask is None
    chunked = module.config.layer_types[module.layer_idx] == "chunked_attention"
    key, value = (part.expand(-1, query.shape[1], -1, -1) for part in (key, value))
    length, pieces = query.shape[2], []
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        rows, first = torch.arange(begin, end)[:, None], 0
        if chunked:
            first = begin - begin % CHUNK
        columns = torch.arange(first, end)
        seen = columns <= rows
        if chunked:
            seen &= torch.div(columns, CHUNK, rounding_mode="floor") == rows // CHUNK
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end], seen
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


@torch.no_grad()
def library_logits(model: torch.nn.Module, token_ids: Tensor) -> Tensor:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("blockwise", blockwise)
    AttentionMaskInterface.register("blockwise", lambda *_, **__: None)
    model.set_attn_implementation("blockwise")
    return model(token_ids[None], use_cache=False, logits_to_keep=LAST).logits[0]


def test_logits_at_the_end_equal_those_without_a_ring() -> None:
    model, ids = oracle("llama4", **SIZES), tokens(LENGTH)
    decoder = decoder_of(model)
    cache = KvCache(decoder.spec, LENGTH, torch.float32)
    assert cache.nbytes == decoder.spec.kv_nbytes(LENGTH, 4) == 2 * 8 * 4 * (LENGTH + 2 * CHUNK)
    started = time.perf_counter()
    for begin in range(0, LENGTH - LAST, 512):
        decoder.forward(Batch.of(ids[begin : min(begin + 512, LENGTH - LAST)], cache))
    single = [
        decoder.forward(Batch.of(ids[i : i + 1], cache)) for i in range(LENGTH - LAST, LENGTH)
    ]
    ours_s, started = time.perf_counter() - started, time.perf_counter()
    expected = library_logits(model, ids)
    found = torch.cat(single)
    worst = float((found - expected).abs().max() / expected.std())
    print(
        f"{LENGTH} tokens: {ours_s:.0f} s, the library {time.perf_counter() - started:.0f} s, "
        f"worst difference {worst:.1e} of the logits' deviation"
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


CHILD = """
import json, sys
from pathlib import Path
import moecli.engine
from moecli.config import EngineConfig, SamplingConfig
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
path, length, kv_dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
before = peak()
with moecli.engine.Engine.open(path, EngineConfig(ctx=length, kv_dtype=kv_dtype)) as engine:
    session = engine.new_session()
    prompt = (engine.encode_text("a long story; " * (length // 14)))[: length - 16]
    list(engine.generate(session, prompt, SamplingConfig(0, max_tokens=8, ignore_eos=True)))
    plan, kept = engine.plan.to_dict(), session.cache.nbytes
print(json.dumps({"grown": peak() - before, "kept": kept, "plan": plan}))
"""


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_memory_is_as_planned(tmp_path: Path, kv_dtype: str) -> None:
    """Seven layers of eight in chunks: without rings the cache would take six times as much."""
    size, layers = 64, 8
    config = tiny.llama4_config() | {
        "num_hidden_layers": layers,
        "no_rope_layers": [1] * (layers - 1) + [0],
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": size,
        "attention_chunk_size": CHUNK,
        "floor_scale": CHUNK,
        "max_position_embeddings": LENGTH,
    }
    tensors = _tensors(config)
    source = tiny.write_checkpoint(tmp_path / "source", config, tensors)
    quantize_model(source, tmp_path / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "out"), str(LENGTH), kv_dtype],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    vector = size + 2 if kv_dtype == "int8" else 2 * size
    plan, whole = found["plan"], 2 * vector * layers * LENGTH
    assert found["kept"] == plan["kv_nbytes"] == 2 * vector * (LENGTH + (layers - 1) * CHUNK)
    print(
        f"{kv_dtype}: planned {plan['ram_nbytes'] / MIB:.1f} MiB, of which the KV cache "
        f"{plan['kv_nbytes'] / MIB:.1f} ({whole / MIB:.1f} without rings); "
        f"measured {found['grown'] / MIB:.1f}"
    )
    # Of int8, 38 and 39 MiB beside the plan were measured at 20,000 and 4,000 tokens: why it takes
    # more than bf16 (21 to 32) is not known, but it does not grow with the context.
    constant = 56 if kv_dtype == "int8" else 40
    assert found["grown"] <= plan["ram_nbytes"] + constant * MIB
    if SOAK:
        assert found["grown"] < whole, "it would have shown if all were kept"


def _tensors(config: dict[str, object]) -> dict[str, Tensor]:
    """Random weights of the sizes that `config` says, by the library's own names."""
    import transformers

    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**config))
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.1 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for name, tensor in model.state_dict().items()
    }
