"""Triton's kernels for many tokens and for dense weights: against fp64, by the memory that they
take, and by what they are compiled to.

They run on poisoned memory: what is read before it was written is NaN.
"""

import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from quant.kernels.experts import ACTIVATIONS
from quant.kernels.triton import grouped, linear
from quant.kernels.triton.card import Card
from quant.layout import ExpertLayout
from quant.quantize import dequantize
from quant.scheme import BITS, GROUP_SIZES, QuantScheme
from quant.tensor import QuantizedWeight
from tests.devices import DEVICE, examples
from tests.quant.quant_experts import (
    Experts,
    assert_close,
    random,
    random_biases,
    random_weight,
)
from tests.triton_compile import compiling, run_python

# Of the largest value: fp32 is summed in another order; the others round weights and results too,
# and Triton's interpreter does not round to the nearest.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}
SCHEMES = st.builds(QuantScheme, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES))
DTYPES = st.sampled_from(list(TOLERANCES))


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    on_device = QuantizedWeight(weight.packed.to(DEVICE), weight.scale.to(DEVICE), weight.scheme)
    return linear.linear_quantized(x.to(DEVICE), on_device)


def check_product(
    num_tokens: int, rows: int, columns: int, scheme: QuantScheme, dtype: Any
) -> None:
    weight = random_weight(rows, columns, scheme, seed=rows)
    x = random(num_tokens, columns, seed=num_tokens).to(dtype)
    y = product(x, weight)
    assert y.dtype == dtype
    assert_close(y, x.double() @ dequantize(weight, torch.float64).t(), TOLERANCES[dtype])


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 8),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    scheme=SCHEMES,
    dtype=DTYPES,
    warps=st.sampled_from([1, 2, 8]),
)
@example(1, 5, 36, QuantScheme(4, 64), torch.float32, 4)  # three blocks, the last one half
@example(1, 5, 36, QuantScheme(4, 64), torch.float32, 1)
@example(8, 3, 9, QuantScheme(8, 128), torch.float32, 2)
def test_few_tokens(
    num_tokens: int, rows: int, groups: int, scheme: QuantScheme, dtype: Any, warps: int
) -> None:
    with patch.object(Card, "warps_a_row", lambda *_: warps):
        check_product(num_tokens, rows, groups * scheme.group_size, scheme, dtype)


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(9, 40),
    rows=st.integers(1, 70),
    groups=st.integers(1, 10),
    scheme=SCHEMES,
    dtype=DTYPES,
    units=st.sampled_from([1, 128]),
)
@example(
    9, 70, 9, QuantScheme(4, 32), torch.float32, 128
)  # three blocks of columns, one split each
@example(130, 65, 5, QuantScheme(4, 32), torch.bfloat16, 1)  # three blocks of tokens
@example(40, 520, 1, QuantScheme(8, 32), torch.float32, 1)  # two bands of two blocks of tokens
def test_many_tokens(
    num_tokens: int, rows: int, groups: int, scheme: QuantScheme, dtype: Any, units: int
) -> None:
    with patch.object(linear, "card_of", lambda _: Card(80, units)):
        check_product(num_tokens, rows, groups * scheme.group_size, scheme, dtype)


def test_few_tokens_do_not_round_the_weight() -> None:
    """127 * (1 + 2^-7) has 14 bits, of which bf16 keeps 8; products that cancel show the others."""
    words = torch.full((1, 8), 0x80808080 - 2**32).int()  # zeros
    words[0, 0] = 0x8081FFFF - 2**32  # 127, 127, 1, 0
    weight = QuantizedWeight(words, torch.tensor([[1 + 2**-7]]).bfloat16(), QuantScheme(8, 32))
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :3] = torch.tensor([1.0, -1.0, 128.0])
    assert product(x, weight).item() == 129.0
    x[0, :3] = torch.tensor([1.0, 0.0, -127.0])
    assert product(x, weight).item() == 0.0
    x[0, :3] = torch.tensor([1.0, 0.0, -126.0])
    assert product(x, weight).item() == 1 + 2**-7


@pytest.mark.parametrize("num_tokens", [0, 2, 10])
def test_x_may_lie_anyhow(num_tokens: int) -> None:
    weight = random_weight(6, 96, QuantScheme(), seed=0)
    x = random(96, 2 * num_tokens).t()[::2]  # neither contiguous nor dense
    y = product(x, weight)
    assert y.shape == (num_tokens, 6)
    assert_close(y, x.double() @ dequantize(weight, torch.float64).t(), 2e-6)


class Call:
    """Tokens and their choices, of which a few experts have most."""

    def __init__(
        self,
        layout: ExpertLayout,
        num_tokens: int,
        top_k: int,
        num_experts: int,
        dtype: torch.dtype = torch.float32,
        *,
        biased: bool = False,
        activation: str = "silu",
        seed: int = 0,
    ) -> None:
        self.experts = Experts(layout, num_experts, DEVICE)
        self.biases = random_biases(layout, num_experts) if biased else None
        self.activation = activation
        self.hidden = random(num_tokens, layout.hidden_size, seed=seed).to(dtype)
        skewed = random(num_tokens, num_experts, seed=seed + 1) - torch.arange(num_experts)
        self.ids = skewed.argsort(-1, descending=True)[:, :top_k].contiguous()
        self.weights = random(num_tokens, top_k, seed=seed + 2).sigmoid()

    def sums(
        self,
        weight_on_input: bool = False,
        present: set[int] | None = None,
        span: tuple[int, int] | None = None,
        before: float = 0.0,
    ) -> Tensor:
        layout = self.experts.layout
        out = torch.full(self.hidden.shape, before, device=DEVICE)
        grouped.add_routed_experts(
            out,
            *(tensor.to(DEVICE) for tensor in (self.hidden, self.ids, self.weights)),
            self.experts.addresses(present),
            layout,
            activation=self.activation,
            weight_on_input=weight_on_input,
            span=span or (0, layout.intermediate_size),
            biases=None if self.biases is None else self.biases.to(DEVICE),
        )
        return out

    def exact(
        self,
        weight_on_input: bool = False,
        present: set[int] | None = None,
        span: tuple[int, int] | None = None,
    ) -> Tensor:
        """fp64 [T, H] on the CPU"""
        out = torch.zeros(self.hidden.shape, dtype=torch.float64)
        for expert in range(self.experts.num_experts) if present is None else present:
            token, choice = (self.ids == expert).nonzero(as_tuple=True)
            x, weight = self.hidden[token].double(), self.weights[token, choice, None].double()
            rules = (span, self.biases, self.activation)
            if weight_on_input:
                out[token] += self.experts.exact(expert, x * weight, *rules)
            else:
                out[token] += self.experts.exact(expert, x, *rules) * weight
        return out


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int, int]:
    """Groups of the intermediate size, and a part of them."""
    groups = draw(st.integers(1, 4))
    begin = draw(st.integers(0, groups - 1))
    return groups, begin, draw(st.integers(begin + 1, groups))


@settings(max_examples=examples(14), deadline=None, derandomize=True)
@given(
    scheme=SCHEMES,
    hidden_groups=st.integers(1, 3),
    span=spans(),
    num_tokens=st.integers(1, 30),
    num_experts=st.integers(1, 6),
    dtype=DTYPES,
    weight_on_input=st.booleans(),
    biased=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    data=st.data(),
)
def test_routed_experts(
    scheme: QuantScheme,
    hidden_groups: int,
    span: tuple[int, int, int],
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
    weight_on_input: bool,
    biased: bool,
    activation: str,
    data: st.DataObject,
) -> None:
    groups, begin, end = (number * scheme.group_size for number in span)
    layout = ExpertLayout(hidden_groups * scheme.group_size, groups, scheme)
    top_k = data.draw(st.integers(1, num_experts), "top_k")
    present = data.draw(st.sets(st.integers(0, num_experts - 1)), "present")
    rules = {"biased": biased, "activation": activation, "seed": num_tokens}
    call = Call(layout, num_tokens, top_k, num_experts, dtype, **rules)
    arguments = (weight_on_input, present, (begin, end))
    tolerance = max(TOLERANCES[dtype], TOLERANCES[grouped._between(dtype)])
    assert_close(call.sums(*arguments), call.exact(*arguments), tolerance)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter, in exp
def test_what_lies_between_the_projections_may_be_more_than_fp16_holds() -> None:
    call = Call(ExpertLayout(64, 64, QuantScheme()), 12, 2, 3, torch.float16)
    call.hidden *= 2000
    exact = call.exact()
    assert exact.abs().max() > 1e6, "nothing would have been too large"
    assert_close(call.sums(), exact, TOLERANCES[torch.bfloat16])


def test_blocks_of_tokens_rows_and_columns() -> None:
    """More than one of each: of the first expert's choices, of bands, of columns, of its rows."""
    for rules in ({}, {"biased": True, "activation": "clamped_swiglu"}):
        call = Call(ExpertLayout(544, 160, QuantScheme(4, 32)), 40, 2, 3, **rules)
        assert_close(call.sums(True), call.exact(True), 2e-6)


def test_sums_are_added_to_what_is_there_and_do_not_change_from_call_to_call() -> None:
    call = Call(ExpertLayout(64, 64, QuantScheme()), 12, 3, 4)
    assert_close(call.sums(before=2.0), call.exact() + 2.0, 2e-6)
    assert torch.equal(call.sums(), call.sums())
    assert (call.sums(present=set(), before=3.0) == 3.0).all()


def test_no_tokens() -> None:
    assert Call(ExpertLayout(64, 64, QuantScheme()), 0, 2, 4).sums().shape == (0, 64)


def before_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last that may be read: the page after it ends the process."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    view = (ctypes.c_uint8 * (size + page)).from_buffer(memory)
    guard = ctypes.c_void_p(ctypes.addressof(view) + size)
    assert ctypes.CDLL(None, use_errno=True).mprotect(guard, page, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8)[size - tensor.nbytes : size]
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def compute_at_the_end_of_memory() -> bool:
    """Whether calls survive weights behind whose last byte nothing may be read."""
    weight = random_weight(13, 160, QuantScheme(), seed=0)  # rows and columns that fill no tile
    packed, scale = map(before_the_end_of_memory, (weight.packed, weight.scale))
    guarded = QuantizedWeight(packed, scale, weight.scheme)
    for num_tokens in (1, 9):
        x = random(num_tokens, 160)
        assert torch.equal(product(x, guarded), product(x, weight))
    call = Call(ExpertLayout(96, 160, QuantScheme()), 9, 1, 1)
    blob = before_the_end_of_memory(call.experts.blob(0))
    with patch.object(Experts, "addresses", lambda *_: torch.tensor([blob.data_ptr()])):
        assert_close(call.sums(), call.exact(), 2e-6)
    return True


@pytest.mark.skipif(DEVICE != "cpu", reason="closes pages of main memory")
def test_nothing_is_read_behind_a_weight(tmp_path: Path) -> None:
    assert run_python(compute_at_the_end_of_memory, tmp_path, interpret=True)


class Allocations(TorchDispatchMode):
    """Bytes of all new tensors, none of which is freed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.existing: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = storage
        return result

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes() for at, s in self._storages.items() if at not in self.existing)


@pytest.mark.parametrize("passes", [1, 3])
def test_workspace_is_bounded_and_as_said(passes: int) -> None:
    layout = ExpertLayout(64, 96, QuantScheme())
    call = Call(layout, 30, 2, 4)
    whole = grouped.workspace_nbytes(30, 2, layout, 4)
    assert whole == 30 * (64 * 4 + 2 * (96 * 4 + 64 * 4 + 96))
    limit = whole if passes == 1 else whole // 3
    inputs = (torch.zeros(30, 64), call.hidden, call.ids, call.weights)
    given_tensors = tuple(tensor.to(DEVICE) for tensor in inputs)
    addresses = call.experts.addresses()
    with patch.object(grouped, "WORKSPACE_NBYTES", limit):
        assert grouped.workspace_nbytes(30, 2, layout, 4) == limit
        with (
            patch.object(grouped, "_add_pass", wraps=grouped._add_pass) as add_pass,
            Allocations() as allocations,
        ):
            allocations.existing = {t.untyped_storage().data_ptr() for t in given_tensors}
            grouped.add_routed_experts(
                *given_tensors, addresses, layout,
                activation="silu", weight_on_input=False, span=(0, 96),
            )  # fmt: skip
    assert add_pass.call_count == passes
    assert_close(given_tensors[0], call.exact(), 2e-6)
    if passes == 1:  # the others' would be counted again
        per_expert = 400  # tables of the experts, which no budget feels
        assert 0.7 * limit < allocations.nbytes <= limit + 4 * per_expert


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    present=st.sets(st.integers(0, 6)),
    block_tokens=st.sampled_from([2, 16]),
)
@example([0] + [1] + [2] + [3] * 3 + [4] * 5 + [5] + [6], set(range(7)), 2)  # the worst routing
def test_every_choice_whose_expert_is_here_is_in_one_block(
    ids: list[int], present: set[int], block_tokens: int
) -> None:
    addresses = torch.tensor([64 * (expert in present) for expert in range(7)], device=DEVICE)
    choices = grouped._sort(torch.tensor(ids, device=DEVICE), addresses, block_tokens)
    found = []
    for expert, start in zip(choices.expert.tolist(), choices.start.tolist(), strict=True):
        if expert < 7:
            block = choices.order[start : min(start + block_tokens, int(choices.ends[expert]))]
            assert {ids[choice] for choice in block.tolist()} == {expert}
            found += block.tolist()
    assert sorted(found) == [place for place, expert in enumerate(ids) if expert in present]


CAPABILITIES = (75, 100, 120)


def compile_all() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """PTX and spilled bytes of each kernel for each GPU, at the shapes of Llama 4 Scout."""
    found = {}
    layout = ExpertLayout(5120, 8192, QuantScheme(4, 32))
    weight = QuantizedWeight(
        torch.zeros(1024, 1280, dtype=torch.int32),
        torch.zeros(1024, 40, dtype=torch.bfloat16),
        QuantScheme(8, 128),
    )
    for capability in CAPABILITIES:
        x = torch.zeros(1024, 5120, dtype=torch.bfloat16)
        with compiling(capability) as programs:
            linear.linear_quantized(x[:1], weight)
            linear.linear_quantized(x[:16], weight)  # rows are split
            linear.linear_quantized(x, weight)
            grouped.add_routed_experts(
                torch.zeros(1024, 5120), x,
                torch.zeros(1024, 1, dtype=torch.int64), x[:, :1].clone(),
                torch.zeros(16, dtype=torch.int64),
                layout, activation="silu", weight_on_input=True, span=(0, 8192),
            )  # fmt: skip
        found[str(capability)] = (programs, programs.spilled)
    return found


def test_kernels_compile_to_wide_loads_and_matrix_units(tmp_path: Path) -> None:
    found = run_python(compile_all, tmp_path, interpret=False)
    kernels = ("_many_kernel", "_gate_up_kernel", "_down_kernel")
    for capability in CAPABILITIES:
        programs, spilled = found[str(capability)]
        assert set(programs) == {"_few_kernel", "_sum_kernel", "_add_kernel", *kernels}
        assert not any("trap;" in program for program in programs.values())
        assert max(spilled.values()) <= 128, spilled  # four times as much where tiles do not fit
        loads = re.findall(r"ld\.global\.L1::evict_first\S*", programs["_few_kernel"])
        assert len(loads) == 4, loads  # one a row, of 16 bytes a thread
        assert all(load.endswith("v4.b32") for load in loads), loads
        for name in kernels if capability == 120 else ():
            program = programs[name]
            assert "mma.sync" in program
            copies = re.findall(r"cp\.async\S+ \[[^]]*\], \[[^]]*\], (\w+)", program)
            assert set(copies) == {"0x10"}, f"{name} copies {set(copies)} bytes at once"
            # Codes become numbers in the registers of the threads that multiply them; when they
            # pass through shared memory, there are 64 stores and more.
            assert len(re.findall(r"st\.shared", program)) <= 32, name
        for name in kernels if capability == 100 else ():
            assert "tcgen05.mma" in programs[name]


def compile_gpt_oss() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """The same of the experts of gpt-oss, with their biases and their gate."""
    layout, found = ExpertLayout(2880, 2880, QuantScheme(4, 32)), {}
    x = torch.zeros(1024, 2880, dtype=torch.bfloat16)
    for capability in (120,):
        with compiling(capability) as programs:
            grouped.add_routed_experts(
                torch.zeros(1024, 2880), x,
                torch.zeros(1024, 4, dtype=torch.int64), x[:, :4].clone(),
                torch.zeros(32, dtype=torch.int64), layout,
                activation="clamped_swiglu", weight_on_input=False, span=(0, 2880),
                biases=torch.zeros(32, 3 * 2880),
            )  # fmt: skip
        found[str(capability)] = (programs, programs.spilled)
    return found


def test_kernels_compile_with_biases_and_the_gate_of_gpt_oss(tmp_path: Path) -> None:
    for programs, spilled in run_python(compile_gpt_oss, tmp_path, interpret=False).values():
        assert set(programs) == {"_gate_up_kernel", "_down_kernel", "_add_kernel"}
        assert not any("trap;" in program for program in programs.values())
        assert max(spilled.values()) <= 128, spilled
