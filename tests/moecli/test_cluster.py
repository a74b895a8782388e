"""How many cards hold a model: by hand where that is short, by promises where it is not."""

from dataclasses import replace

import pytest

from moecli import cluster, known
from moecli.cluster import CARD_GIB, Cluster, commands, smallest
from moecli.footprint import expert_nbytes
from moecli.models.config import DenseTensor
from moecli.models.hf_outline import read_counted
from moecli.models.outline import Counted
from moecli.schemes import fitting
from moecli.units import GIB
from quant.scheme import QuantScheme

INT4 = QuantScheme.parse("int4")
NAMES = [spec.name for spec in known.SPECS]


def counted(name: str) -> Counted:
    spec = known.find(name)
    assert spec is not None
    return read_counted(spec.config())


def test_a_dense_model_on_one_card_by_hand() -> None:
    found = smallest(counted("llama3.1-8b"), None, 8192, 24)
    weights = 2 * 8_030_261_248
    kv = 8192 * 32 * 2 * 8 * 128 * 2
    assert found == Cluster("bf16", 24, 1, 1, False, weights + kv)
    assert weights + kv < 0.9 * 24 * GIB - 2 * GIB


def test_scout_in_int4_on_two_cards_by_hand() -> None:
    """Linears, embeddings and experts are halved; norms, routers and the vision tower are not."""
    scout = counted("llama4-scout")
    found = smallest(scout, INT4, 8192, 48)
    attention, shared = 62_914_560, 125_829_120
    halved = 48 * (attention + shared) + 2 * 1_034_485_760
    whole = 48 * (16 * 5120 + 2 * 5120) + 871_932_416
    experts = 768 * 70_778_880
    kv = 1536 << 20
    whole += 5120  # the last norm
    assert found == Cluster("int4-g32", 48, 2, 1, True, halved + 2 * whole + experts // 2 + kv // 2)


def test_stages_divide_layers_where_cards_cannot_divide_heads() -> None:
    found = smallest(counted("llama4-scout"), INT4, 8192, 24)
    assert found is not None
    assert (found.tensor_parallel, found.pipeline_parallel) == (1, 5), "8 KV heads on 5 cards"
    assert found.num_nodes == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_holds_the_model_and_keeps_the_reserve(name: str) -> None:
    spec = counted(name)
    for scheme in (None, fitting(spec, INT4, experts=True)):
        experts = len(spec.moe_layers) * spec.num_experts * expert_nbytes(spec, scheme)
        weights = experts + 2 * sum(tensor.numel for tensor in spec.dense_tensors)
        for gib in CARD_GIB:
            found = smallest(spec, scheme, 8192, gib)
            assert found is not None
            assert found.card_nbytes <= 0.9 * gib * GIB - 2 * GIB
            assert found.num_cards * found.card_nbytes >= weights, "every byte has a place"
            assert found.pipeline_parallel <= spec.num_layers
            assert spec.num_heads % found.tensor_parallel == 0
            if found.expert_parallel:
                assert spec.num_experts % found.tensor_parallel == 0
            if found.num_cards > 8:
                assert found.tensor_parallel == 8, "whole nodes"
                assert found.num_nodes == found.pipeline_parallel


@pytest.mark.parametrize("name", NAMES)
def test_larger_cards_are_never_more_and_longer_contexts_never_fewer(name: str) -> None:
    spec = counted(name)
    for ctx in (1024, min(131072, spec.max_context)):
        cards = [found.num_cards for gib in CARD_GIB if (found := smallest(spec, None, ctx, gib))]
        assert cards == sorted(cards, reverse=True)
    short, long = (smallest(spec, None, ctx, 24) for ctx in (1024, min(131072, spec.max_context)))
    assert short is not None
    assert long is None or long.num_cards >= short.num_cards


def test_latents_lie_whole_on_every_card_and_heads_do_not() -> None:
    def held(name: str, ctx: int, cards: int) -> int:
        return cluster._fullest_nbytes(counted(name), None, ctx, cards, 1)

    for name, parts in (("deepseek-v3", 1), ("llama3.1-8b", 8), ("qwen3-30b-a3b", 4)):
        more = held(name, 9216, 8) - held(name, 1024, 8)
        assert more == counted(name).kv_nbytes(8192, 2) // parts, name


def test_a_model_is_divided_only_where_its_heads_and_groups_allow_it() -> None:
    mixtral, llama = counted("mixtral-8x7b"), counted("llama3.1-8b")
    assert cluster._whole_experts(mixtral, INT4, 8) is True
    assert cluster._whole_experts(mixtral, INT4, 1) is False, "one card has all anyway"
    odd = replace(mixtral, num_kv_heads=6)
    assert [cluster._whole_experts(odd, INT4, cards) for cards in (2, 4)] == [True, None]
    assert cluster._whole_experts(replace(mixtral, num_heads=12), INT4, 8) is None
    narrow = replace(llama, expert_intermediate_size=1408)  # 44 groups of 32
    assert [cluster._whole_experts(narrow, INT4, cards) for cards in (4, 8)] == [False, None]
    assert cluster._whole_experts(narrow, None, 8) is False, "176 rows a card"


def test_what_makes_latents_lies_on_every_card() -> None:
    shape = 1536, 7168
    whole = DenseTensor("layers.0.q_a_proj", shape, linear=True)
    divided = DenseTensor("layers.0.q_b_proj", shape, linear=True)
    norm = DenseTensor("layers.0.input_norm", (7168,))
    shares = [cluster._share(tensor, 8) for tensor in (whole, divided, norm)]
    assert shares == [2 * 1536 * 7168, 2 * 1536 * 7168 // 8, 2 * 7168]


def test_one_node_needs_no_ray_and_several_do() -> None:
    one = Cluster("bf16", 80, 4, 1, True, 0)
    assert commands(one, "org/model", 4096) == [
        "vllm serve org/model --tensor-parallel-size 4 --enable-expert-parallel "
        "--max-model-len 4096 --gpu-memory-utilization 0.9"
    ]
    three = Cluster("bf16", 80, 8, 3, False, 0)
    lines = commands(three, "org/model", 4096)
    assert lines[:2] == ["ray start --head --port=6379", "ray start --address=FIRST_NODE:6379"]
    assert "--pipeline-parallel-size 3 --distributed-executor-backend ray" in lines[2]
    assert "expert" not in lines[2]
    staged = Cluster("bf16", 24, 1, 5, False, 0)
    (line,) = commands(staged, "org/model", 4096)
    assert "--pipeline-parallel-size 5" in line
    assert "ray" not in line
