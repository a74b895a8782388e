"""The sizes that only a run on a graphics card takes, or only other schemes of dense weights."""

import pytest
import torch

from moecli.footprint import codes_nbytes, model_footprint, tensor_nbytes
from moecli.models.config import DenseTensor, ModelSpec
from quant.scheme import QuantScheme
from tests.e2e.tiny import llama4_config, qwen3_config

SCHEMES = QuantScheme(4, 32), QuantScheme(8, 32)


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (640, 512), (1, 1), (129, 127)])
def test_dense_schemes_of_a_run_take_what_bitsandbytes_keeps(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    linear = DenseTensor("q_proj", shape, linear=True)
    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    nested = state.state2
    tensors = (packed, state.absmax, nested.absmax, nested.code, state.offset)
    assert tensor_nbytes(linear, None, "nf4") == sum(t.nbytes for t in tensors)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    assert tensor_nbytes(linear, SCHEMES[1], "llm-int8") == codes.nbytes + scales.nbytes


def test_only_linear_weights_are_converted() -> None:
    norm = DenseTensor("norm", (64,))
    for run_scheme in ("stored", "nf4", "llm-int8"):
        assert tensor_nbytes(norm, SCHEMES[1], run_scheme) == 128


@pytest.mark.parametrize("config", [llama4_config(), qwen3_config()])
def test_footprint_for_a_device(config: dict) -> None:
    spec = ModelSpec.from_hf(config)
    stored = model_footprint(spec, *SCHEMES, 300, 128)
    assert stored.intermediate_size == spec.expert_intermediate_size
    assert (stored.group_size, stored.prefill_tokens) == (32, 128)
    assert model_footprint(spec, *SCHEMES, 50, 128).prefill_tokens == 50
    inner = 128 * spec.experts_per_token * spec.expert_intermediate_size
    on_host = codes_nbytes(spec, 128)  # what the kernels of the processor keep
    assert stored.device_workspace == stored.workspace_nbytes - on_host + 4 * inner
    row = 3 * (spec.hidden_size // 2 + spec.hidden_size // 32 * 2)
    assert stored.expert_nbytes == spec.expert_intermediate_size * row
    nf4 = model_footprint(spec, *SCHEMES, 300, 128, "nf4")
    changed = sum(
        tensor_nbytes(t, SCHEMES[1]) - tensor_nbytes(t, SCHEMES[1], "nf4")
        for t in spec.dense_tensors
    )
    assert stored.dense_nbytes - nf4.dense_nbytes == changed
    assert nf4.embedding_nbytes == stored.embedding_nbytes
