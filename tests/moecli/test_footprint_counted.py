"""Sizes of what is counted by its outline, and the groups that divide it."""

from dataclasses import replace

import pytest

from moecli import known
from moecli.footprint import (
    codes_nbytes,
    expert_layout,
    expert_nbytes,
    model_footprint,
    stored_nbytes,
    workspace_nbytes,
)
from moecli.models.hf_outline import read_counted
from moecli.models.outline import Counted, Outline
from moecli.schemes import fitting
from quant.scheme import QuantScheme


def counted(name: str) -> Counted:
    spec = known.find(name)
    assert spec is not None
    return read_counted(spec.config())


def test_biases_of_a_dense_mlp_lie_beside_it_in_16_bits() -> None:
    llama = counted("llama3.1-8b")
    assert isinstance(llama, Outline)
    outline = replace(llama, expert_bias=True)
    scheme = QuantScheme(4, 32)
    weights = 3 * 4096 * 14336 * 9 // 16  # 4.5 bits
    biases = 2 * (2 * 14336 + 4096)
    assert expert_nbytes(outline, scheme) == weights + biases
    assert expert_nbytes(outline, None) == 2 * outline.expert_numel
    assert expert_nbytes(counted("mixtral-8x7b"), scheme) == 3 * 4096 * 14336 * 9 // 16
    footprint = model_footprint(outline, scheme, None, 300, 128)
    assert footprint.expert_nbytes == weights + biases
    assert footprint.slot_nbytes % 4096 == 0
    assert 0 <= footprint.slot_nbytes - footprint.expert_nbytes < 4096


def test_groups_are_the_widest_that_divide_every_row() -> None:
    oss, scout = counted("gpt-oss-20b"), counted("llama4-scout")
    int8, int4 = QuantScheme.parse("int8"), QuantScheme.parse("int4")
    assert fitting(oss, int8, experts=True).name == "int8-g64"
    assert fitting(oss, int8, experts=False).name == "int8-g64"
    assert fitting(oss, int4, experts=True).name == "int4-g32", "never wider than asked for"
    assert fitting(scout, int8, experts=True) == int8
    odd = replace(oss, hidden_size=48)
    assert fitting(odd, int8, experts=True) == int8, "nothing fits: the layout says so"


def test_scout_takes_in_files_what_its_parts_take() -> None:
    """Bytes by hand: experts at 4.5 bits, other linears at 8.125, the rest at 16."""
    scout = counted("llama4-scout")
    experts, linears = 96_636_764_160, 48 * (62_914_560 + 125_829_120) + 1_034_485_760
    rest = scout.num_params - experts - linears
    int8, int4 = QuantScheme.parse("int8"), QuantScheme.parse("int4")
    nbytes = experts * 9 // 16 + linears * 65 // 64 + 2 * rest
    assert stored_nbytes(scout, int4, int8) == nbytes
    assert stored_nbytes(scout, None, None) == 217_283_587_072


@pytest.mark.parametrize("name", [spec.name for spec in known.SPECS])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_some_group_divides_every_row_of_every_built_in_model(name: str, scheme: str) -> None:
    spec = counted(name)
    rest = fitting(spec, QuantScheme.parse(scheme), experts=False)
    for tensor in spec.dense_tensors:
        if tensor.linear:
            rest.check_shape(tensor.name, *tensor.shape)
    expert_layout(spec, fitting(spec, QuantScheme.parse(scheme), experts=True))


def test_what_the_processors_kernels_keep_is_part_of_the_workspace() -> None:
    """By hand: 512 tokens of Qwen3-30B-A3B with 8 choices of 2048 and 768 numbers each, 10 bits a
    number; measured: 14.9 MiB, with what each of two threads keeps for itself.
    """
    qwen = counted("qwen3-30b-a3b")
    assert codes_nbytes(qwen, 512) == 512 * 8 * (2048 + 768) * 10 // 8
    assert codes_nbytes(replace(qwen, experts_per_token=1), 512) == 512 * 4096 * 10 // 8, "o_proj"
    footprint = model_footprint(qwen, QuantScheme(4, 32), QuantScheme(8, 128), 8192, 512)
    assert footprint.workspace_nbytes == workspace_nbytes(qwen, 8192, 512) + codes_nbytes(qwen, 512)
