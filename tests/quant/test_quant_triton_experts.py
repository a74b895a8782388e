"""Routed experts by Triton kernels: against fp64, in order, and as compiled for GPUs."""

import ctypes
import mmap
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import ops
from quant.kernels.experts import ACTIVATIONS
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

pytest.importorskip("triton")
from quant.kernels.triton import experts as kernels
from quant.kernels.triton.card import Card

REAL_ROWS = {"_GATE_UP_ROWS": 4, "_DOWN_ROWS": 8}  # of a tile on a GPU


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    before = ops.current_backend()
    ops.set_backend("triton")
    yield
    ops.set_backend(before)


class Call:
    """One call of the op on a random layer; ids may name an expert twice in different tokens."""

    def __init__(
        self,
        scheme: QuantScheme,
        hidden_groups: int,
        intermediate_groups: int,
        shape: tuple[int, int],
        *,
        span_groups: tuple[int, int] | None = None,
        weight_on_input: bool = False,
        dtype: torch.dtype = torch.float32,
        present: set[int] | None = None,
        biased: bool = False,
        activation: str = "silu",
        seed: int = 0,
    ) -> None:
        group = scheme.group_size
        layout = ExpertLayout(hidden_groups * group, intermediate_groups * group, scheme)
        self.experts, self.present = Experts(layout, 4, DEVICE), present
        tokens, choices = shape
        hidden = random(tokens, layout.hidden_size, seed=seed).to(dtype)
        self.hidden = hidden.t().contiguous().t().to(DEVICE)  # strided as no kernel wants it
        ids = random(choices, tokens, 4, seed=seed + 1).argsort(-1)[..., 0].t()
        self.ids = ids.to(DEVICE)  # [T, k]
        self.weights = random(tokens, choices, seed=seed + 2).sigmoid().to(dtype).to(DEVICE)
        self.span = span_groups and (span_groups[0] * group, span_groups[1] * group)
        self.options: dict[str, Any] = {
            "weight_on_input": weight_on_input,
            "span": self.span,
            "biases": random_biases(layout, 4).to(DEVICE) if biased else None,
            "activation": activation,
        }

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, ExpertLayout]:
        addresses = self.experts.addresses(self.present)
        return (self.hidden, self.ids, self.weights, addresses, self.experts.layout)

    def sums(self, before: Tensor) -> Tensor:
        """`before`, and what the op adds to it; nothing around it may change."""
        guarded = torch.full((before.numel() + 64,), 7.0, device=DEVICE)
        out = guarded[:-64].view(before.shape).copy_(before)
        ops.add_routed_experts(out, *self.arguments, **self.options)
        assert (guarded[-64:] == 7.0).all()
        return out

    def contributions(self) -> Tensor:
        """fp64 [T, k, H]"""
        return self.experts.contributions(
            self.hidden, self.ids, self.weights, present=self.present, **self.options
        )

    def check(self) -> None:
        before = random(*self.hidden.shape, seed=9).to(DEVICE)
        added = self.sums(before)
        assert_close(added, before.cpu().double() + self.contributions().sum(1))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    scheme = QuantScheme(draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES)))
    intermediate = draw(st.integers(1, 5))
    begin = draw(st.integers(0, intermediate - 1))
    return Call(
        scheme,
        draw(st.integers(1, 5)),
        intermediate,
        (draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        span_groups=draw(st.sampled_from([None, (begin, draw(st.integers(begin + 1, 5)))]))
        if intermediate == 5
        else None,
        weight_on_input=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        present=draw(st.none() | st.sets(st.integers(0, 3))),
        biased=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=examples(20), deadline=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_any_call_agrees_with_fp64(call: Call) -> None:
    call.check()


@pytest.mark.parametrize(
    ("scheme", "hidden", "intermediate"),
    [(QuantScheme(4, 32), 34, 67), (QuantScheme(8, 128), 5, 10)],  # three tiles a row of down
    ids=str,
)
@pytest.mark.parametrize("warps", [1, 2, 8])
@pytest.mark.parametrize("choices", [1, 2])
def test_warps_share_long_rows(
    monkeypatch: pytest.MonkeyPatch,
    scheme: QuantScheme,
    hidden: int,
    intermediate: int,
    warps: int,
    choices: int,
) -> None:
    monkeypatch.setattr(Card, "warps_a_row", lambda *_: warps)
    Call(scheme, hidden, intermediate, (2, choices), span_groups=(1, intermediate)).check()


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_tiles_as_they_are_on_a_gpu(monkeypatch: pytest.MonkeyPatch, weight_on_input: bool) -> None:
    for name, rows in REAL_ROWS.items():
        monkeypatch.setattr(kernels, name, rows)
    Call(
        QuantScheme(4, 32), 3, 2, (1, 2), present={0, 1, 2}, weight_on_input=weight_on_input
    ).check()


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("span", [None, (0, 1), (1, 3)])
@pytest.mark.parametrize("tokens", [2, 9])
def test_biases_and_the_gate_of_gpt_oss(
    choices: int, span: tuple[int, int] | None, tokens: int
) -> None:
    """Of spans, too, which add up; for few tokens and for many; one expert is not here."""
    call = Call(
        QuantScheme(4, 32), 3, 3, (tokens, choices),
        span_groups=span, present={0, 1, 3}, biased=True, activation="clamped_swiglu",
    )  # fmt: skip
    call.check()


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_no_number_is_not_hidden_by_a_limit(tokens: int) -> None:
    call = Call(QuantScheme(), 2, 2, (tokens, 1), activation="clamped_swiglu")
    call.hidden[0] = torch.nan
    assert call.sums(torch.zeros(call.hidden.shape, device=DEVICE))[0].isnan().all()


def test_sums_go_by_choices_and_each_choice_counts_alone() -> None:
    call = Call(QuantScheme(8, 32), 3, 2, (2, 3), present={0, 2, 3})
    hidden, ids, weights, addresses, layout = call.arguments
    parts = ops.routed_experts(*call.arguments)  # [T, k, H]
    assert_close(parts, call.contributions())
    assert (parts[ids == 1] == 0).all()
    before = random(*hidden.shape, seed=4).to(DEVICE)
    assert torch.equal(call.sums(before), before + (parts[:, 0] + parts[:, 1] + parts[:, 2]))
    alone = ops.routed_experts(hidden[1:2], ids[1:2, 1:], weights[1:2, 1:], addresses, layout)
    assert torch.equal(alone[0, 0], parts[1, 1])


def test_nobody_and_nothing() -> None:
    call = Call(QuantScheme(), 2, 2, (2, 2), present=set())
    before = random(*call.hidden.shape).to(DEVICE)
    assert torch.equal(call.sums(before), before)
    out = torch.empty(0, 64, device=DEVICE)
    _, _, _, addresses, layout = call.arguments
    nothing = (call.hidden[:0], call.ids[:0], call.weights[:0])
    ops.add_routed_experts(out, *nothing, addresses, layout)


def compute_at_the_end_of_memory() -> bool:
    """Whether a call survives experts behind whose last byte nothing may be read."""
    ops.set_backend("triton")
    call = Call(QuantScheme(4, 32), 3, 3, (1, 1))  # rows and columns that fill no tile
    layout = call.experts.layout
    memory = mmap.mmap(-1, -(-layout.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    end = len(memory) - mmap.PAGESIZE
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    blob = torch.frombuffer(memory, dtype=torch.uint8)[end - layout.nbytes : end]
    blob.copy_(call.experts.blob(int(call.ids)))
    none = ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0)
    assert none == 0, "the page could not be closed"
    out = torch.zeros(call.hidden.shape)
    addresses = torch.full((4,), blob.data_ptr())
    ops.add_routed_experts(out, *call.arguments[:3], addresses, layout)
    assert_close(out, call.contributions().sum(1))
    return True


@pytest.mark.skipif(DEVICE != "cpu", reason="closes pages of main memory")
def test_nothing_is_read_behind_an_expert(tmp_path: Path) -> None:
    assert run_python(compute_at_the_end_of_memory, tmp_path, interpret=True)


def test_schema_and_shape_function() -> None:
    call = Call(QuantScheme(), 2, 2, (1, 2))
    flat = (64, 4, 32, "silu", True, 32, 64)
    torch.library.opcheck(
        torch.ops.moecli.add_routed_experts.default,
        (torch.ones(1, 64, device=DEVICE), *call.arguments[:4], None, *flat),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_more_tokens_go_to_the_kernels_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def kernels_called(name: str) -> object:
        taken.append(name)
        return types.SimpleNamespace(add_routed_experts=lambda *_, **__: None)

    monkeypatch.setattr("quant.kernels.triton._kernels", kernels_called)
    for num_tokens in (1, 8, 9, 64):
        call = Call(QuantScheme(), 1, 1, (num_tokens, 1))
        call.sums(torch.zeros(num_tokens, 32, device=DEVICE))
    assert taken == ["experts", "experts", "grouped", "grouped"]


def test_many_tokens() -> None:
    pytest.importorskip("quant.kernels.triton.grouped")
    Call(QuantScheme(), 2, 3, (9, 2), span_groups=(1, 3), present={0, 1, 3}).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype) -> None:
    pytest.importorskip("quant.kernels.triton.linear")
    weight = random_weight(48, 64, QuantScheme(), 1)
    x = random(3, 64).to(dtype)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    on_device = QuantizedWeight(weight.packed.to(DEVICE), weight.scale.to(DEVICE), weight.scheme)
    y = ops.linear(x.to(DEVICE), on_device)
    assert y.dtype == dtype
    assert_close(y, exact, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_weights_of_another_dtype_are_widened_in_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("quant.kernels.triton._WIDENED_NBYTES", 64 * 4 * 3)
    x, weight = random(2, 3, 64).to(dtype).to(DEVICE), random(7, 64).bfloat16().to(DEVICE)
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    exact = x.cpu().double() @ weight.cpu().double().t()
    assert_close(y, exact, 1e-5 if dtype == torch.float32 else 1e-2)


CAPABILITIES = (75, 86, 120)


def compile_all() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """PTX and spilled bytes of each kernel for each GPU: two choices at the shapes of Scout."""
    layout = ExpertLayout(5120, 8192, QuantScheme(4, 32))
    found = {}
    for capability in CAPABILITIES:
        with compiling(capability) as programs:
            kernels.add_routed_experts(
                torch.zeros(1, 5120), torch.zeros(1, 5120, dtype=torch.bfloat16),
                torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bfloat16),
                torch.zeros(16, dtype=torch.int64), layout,
                activation="silu", weight_on_input=True, span=(0, 8192),
            )  # fmt: skip
        found[str(capability)] = (programs, programs.spilled)
    return found


def compile_gpt_oss() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """The same at the shapes of gpt-oss, with its biases and its gate."""
    layout = ExpertLayout(2880, 2880, QuantScheme(4, 32))
    found = {}
    for capability in (86,):
        with compiling(capability) as programs:
            kernels.add_routed_experts(
                torch.zeros(1, 2880), torch.zeros(1, 2880, dtype=torch.bfloat16),
                torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bfloat16),
                torch.zeros(32, dtype=torch.int64), layout,
                activation="clamped_swiglu", weight_on_input=False, span=(0, 2880),
                biases=torch.zeros(32, 3 * 2880),
            )  # fmt: skip
        found[str(capability)] = (programs, programs.spilled)
    return found


def test_kernels_compile_to_wide_loads_and_no_barriers_between_them(tmp_path: Path) -> None:
    found = run_python(compile_all, tmp_path, interpret=False)
    for capability in CAPABILITIES:
        programs, spilled = found[str(capability)]
        assert set(programs) == {"_gate_up_kernel", "_down_kernel", "_add_kernel"}
        assert not any(spilled.values()), spilled
        for name in ("_gate_up_kernel", "_down_kernel"):
            loads = re.findall(r"ld\.global\.L1::evict_first\S*", programs[name])
            assert len(loads) == 8, f"{name}: {loads}"
            assert all(load.endswith("v4.b32") for load in loads), f"{name}: {loads}"
            last_load = programs[name].rindex("ld.global.L1::evict_first")
            assert "bar.sync" not in programs[name][:last_load]
        # Two warps a program here, which add up at the end; were it one, nothing would wait.
        assert "bar.sync" in programs["_down_kernel"]
        assert "bar.sync" not in programs["_gate_up_kernel"]


def test_kernels_compile_with_biases_and_the_gate_of_gpt_oss(tmp_path: Path) -> None:
    found = run_python(compile_gpt_oss, tmp_path, interpret=False)
    for programs, spilled in found.values():
        assert set(programs) == {"_gate_up_kernel", "_down_kernel", "_add_kernel"}
        assert not any(spilled.values()), spilled
        for name in ("_gate_up_kernel", "_down_kernel"):
            loads = re.findall(r"ld\.global\.L1::evict_first\S*", programs[name])
            assert loads, name
            assert all(load.endswith("v4.b32") for load in loads), f"{name}: {loads}"
