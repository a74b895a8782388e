"""The host lane: whatever either side does, the other gets its answer or is told."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload import lane_ops
from offload.errors import OffloadError
from offload.host_lane import HostLane, Serve
from offload.pinning import SimulatedPinner
from tests.devices import DEVICE

HIDDEN, EXPERTS, TOP_K, MAX_TOKENS = 40, 6, 2, 3
BACKENDS = ["reference", "triton"] if DEVICE == "cpu" else ["triton"]  # a card has kernels alone
PATIENCE = 1 << (16 if DEVICE == "cpu" else 22)  # looks: some seconds, interpreted or not


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    lane_ops.interpret_kernels(request.param == "triton")
    yield request.param
    lane_ops.interpret_kernels(False)


def make_lane(serve: Serve, device: str = DEVICE, **options: object) -> HostLane:
    options = {"max_spins": PATIENCE, **options}
    return HostLane(HIDDEN, EXPERTS, TOP_K, MAX_TOKENS, serve, device, **options)  # type: ignore[arg-type]


def step(
    lane: HostLane, mask: list[int], seed: int = 0, tokens: int = 1, layer_index: int = 0
) -> tuple[Tensor, Tensor]:
    """Ring and wait; the reply, copied."""
    ring(lane, mask, seed, tokens, layer_index)
    partial, addresses = lane.wait()
    return partial.clone().cpu(), addresses.clone().cpu()


def ring(lane: HostLane, mask: list[int], seed: int, tokens: int, layer_index: int = 0) -> None:
    request = (*arguments(seed, tokens), torch.tensor(mask, dtype=torch.int32))
    lane.ring(layer_index, *(tensor.to(lane._device) for tensor in request))


def arguments(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.bfloat16)
    ids = torch.randint(EXPERTS, (tokens, TOP_K), generator=draw)
    return hidden, ids, torch.rand(tokens, TOP_K, generator=draw)


def weighted(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """A partial sum that shows everything that came along."""
    chosen = mask[ids] * weights * (ids + 1)  # [T, k]
    return hidden * chosen.sum(dim=1, keepdim=True) + layer


STEPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0, 0, 1]), min_size=EXPERTS, max_size=EXPERTS),
        st.integers(1, MAX_TOKENS),
        st.integers(0, 70),  # layer
        st.booleans(),  # a partial sum
        st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 2**62)),
    ),
    max_size=8,
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_each_request_gets_its_own_answer(backend: str, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    plan: dict[str, object] = {}
    layers: list[int] = []

    def serve(
        layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, dict[int, int] | None]:
        layers.append(layer)
        partial = weighted(layer, hidden, ids, weights, mask) if plan["partial"] else None
        return partial, plan["addresses"]  # type: ignore[return-value]

    lane = make_lane(serve)
    with lane.armed():
        for seed, (mask, tokens, layer, has_partial, addresses) in enumerate(steps):
            plan.update(partial=has_partial, addresses=addresses or None)
            partial, table = step(lane, mask, seed, tokens, layer)
            hidden, ids, weights = arguments(seed, tokens)
            expected = torch.zeros(tokens, HIDDEN)
            if any(mask) and has_partial:
                expected = weighted(layer, hidden.float(), ids, weights, torch.tensor(mask))
            assert torch.equal(partial, expected)
            found = {e: a for e, a in enumerate(table.tolist()) if a}
            assert found == (addresses if any(mask) else {})
    assert layers == [layer for mask, _, layer, _, _ in steps if any(mask)]
    lane.close()


def echo(
    layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
) -> tuple[Tensor, None]:
    return hidden, None


MASKED, UNMASKED = [0, 0, 1, 0, 0, 0], [0] * EXPERTS


def test_an_error_of_serve_is_raised_by_check_and_answered_with_zeros(backend: str) -> None:
    calls = 0

    def serve(*request: object) -> tuple[Tensor, dict[int, int]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OffloadError("the disk is gone", "buy one")
        return torch.ones(1, HIDDEN), {1: 5}

    lane = make_lane(serve)
    with lane.armed():
        partial, addresses = step(lane, MASKED)
        assert partial.all()
        lane.check()
        for _ in range(2):  # the second without another call: something is wrong already
            partial, addresses = step(lane, MASKED)
            assert not partial.any()
            assert not addresses.any()
        assert calls == 2
        with pytest.raises(OffloadError, match="the disk is gone") as caught:
            lane.check()
        assert caught.value.hint == "buy one"
        lane.check()
        partial, addresses = step(lane, MASKED)
        assert partial.all()
        assert addresses.tolist() == [0, 5, 0, 0, 0, 0]
    lane.close()


def await_rest(lane: HostLane) -> None:
    """Until the host has answered all that was asked."""
    end = time.monotonic() + 20
    while lane._server._answered.value != lane._server._bell.value:
        assert time.monotonic() < end, "the host does not answer"
        time.sleep(0.001)


def interrupt(lane: HostLane) -> None:
    """Between a ring and its wait."""
    with lane.armed():
        ring(lane, MASKED, 0, tokens=2)
        await_rest(lane)
        raise KeyboardInterrupt


def test_the_end_of_armed_raises_what_nobody_checked() -> None:
    def serve(*request: object) -> tuple[None, None]:
        raise ValueError("a bug")

    lane = make_lane(serve)
    with pytest.raises(ValueError, match="a bug"), lane.armed():
        step(lane, MASKED)
    with pytest.raises(KeyboardInterrupt):  # which goes before
        interrupt(lane)
    with pytest.raises(ValueError, match="a bug"):
        lane.check()
    lane.close()


def test_a_partial_sum_of_another_shape_is_told() -> None:
    lane = make_lane(lambda *request: (torch.ones(2, HIDDEN), None))
    with pytest.raises(AssertionError, match="the partial sum is"), lane.armed():
        assert not step(lane, MASKED)[0].any()
    lane.close()


def test_a_reply_that_does_not_come_stops_nobody(backend: str) -> None:
    gate, served = threading.Event(), []

    def serve(
        layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        served.append(layer)
        assert gate.wait(20)
        return torch.ones_like(hidden), None

    lane = make_lane(serve, max_spins=5)

    def impatient() -> None:
        with lane.armed():
            assert not step(lane, MASKED, layer_index=0)[0].any()
            assert not step(lane, MASKED, layer_index=1)[0].any()  # is not even asked
            gate.set()
            await_rest(lane)
            lane._max_spins = PATIENCE
            assert not step(lane, MASKED, layer_index=2)[0].any()  # nor are any others

    with pytest.raises(OffloadError, match="did not answer"):
        impatient()
    assert served == [0]
    with lane.armed():
        assert step(lane, MASKED, layer_index=3)[0].all()
    assert served == [0, 3]
    lane.close()


def test_a_lane_that_is_not_armed_is_told(backend: str) -> None:
    layers: list[int] = []

    def serve(layer: int, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, dict[int, int]]:
        layers.append(layer)
        return hidden, {2: 7}

    lane = make_lane(serve)
    with lane.armed():
        assert step(lane, MASKED, layer_index=0)[0].any()
    lane._max_spins = 5
    partial, addresses = step(lane, MASKED, layer_index=1)
    assert not partial.any()  # the last reply is not taken for this one's
    assert not addresses.any()
    with pytest.raises(OffloadError, match="did not answer"):
        lane.check()
    lane.check()
    lane._max_spins = PATIENCE
    with lane.armed():
        assert torch.equal(step(lane, MASKED, 3, layer_index=2)[0], arguments(3, 1)[0].float())
    assert layers == [0, 2]
    lane.close()


def test_what_an_interrupted_step_rang_for_is_forgotten(backend: str) -> None:
    lane = make_lane(echo)
    with pytest.raises(KeyboardInterrupt):
        interrupt(lane)
    with lane.armed():
        with pytest.raises(AssertionError, match="without a ring"):
            lane.wait()
        assert torch.equal(step(lane, MASKED, 3)[0], arguments(3, 1)[0].float())
        assert not step(lane, UNMASKED, 3)[0].any()
    lane.close()


def test_taken_comes_before_the_next_serve_and_at_the_end() -> None:
    order: list[str] = []

    def serve(
        layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
    ) -> tuple[None, None]:
        order.append(f"serve {layer}")
        return None, None

    lane = make_lane(serve, taken=lambda: order.append("taken"))
    with lane.armed():
        step(lane, MASKED, layer_index=1)
        step(lane, UNMASKED, layer_index=2)
        step(lane, MASKED, layer_index=3)
    assert order == ["taken", "serve 1", "taken", "serve 3", "taken"]
    lane.close()


def test_wrong_use_is_a_bug() -> None:
    lane = make_lane(echo)
    mask = torch.zeros(EXPERTS, dtype=torch.int32)
    with pytest.raises(AssertionError, match="4 tokens, at most 3"):
        lane.ring(0, *arguments(0, 4), mask)
    with pytest.raises(AssertionError, match="the mask is"):
        lane.ring(0, *arguments(0, 1), mask.bool())
    ring(lane, UNMASKED, 0, tokens=1)
    with pytest.raises(AssertionError, match="rung twice"):
        ring(lane, UNMASKED, 0, tokens=1)
    with lane.armed(), pytest.raises(AssertionError, match="armed twice"), lane.armed():
        pass
    lane.close()
    lane.close()
    with pytest.raises(AssertionError, match="closed"), lane.armed():
        pass


def test_a_mailbox_that_cannot_be_pinned_is_told() -> None:
    with pytest.raises(OffloadError, match="pins no") as caught:
        make_lane(echo, "cpu", pinner=SimulatedPinner(limit_nbytes=4095))
    assert caught.value.hint is not None


def test_closing_unpins_and_ends_the_thread() -> None:
    pinner = SimulatedPinner()
    lane = make_lane(echo, "cpu", pinner=pinner)
    with lane.armed():
        step(lane, MASKED)
    thread = lane._server.thread
    assert thread is not None
    assert thread.is_alive()
    assert pinner.pieces
    lane.close()
    assert not thread.is_alive()
    assert not pinner.pieces


def test_a_lane_nobody_refers_to_ends_its_thread() -> None:
    pinner = SimulatedPinner()
    lane: HostLane | None = make_lane(echo, "cpu", pinner=pinner)
    assert lane is not None
    with lane.armed():
        step(lane, MASKED)
    thread, gone = lane._server.thread, weakref.ref(lane)
    assert thread is not None
    lane = None
    gc.collect()
    assert gone() is None
    thread.join(20)
    assert not thread.is_alive()
    assert not pinner.pieces


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)"])
def test_the_interpreter_exits_quietly_while_armed(ending: str) -> None:
    code = f"""
import sys
sys.path[:0] = sys.argv[1:]
import torch
from offload.host_lane import HostLane
lane = HostLane(8, 4, 1, 1, lambda *request: (None, None), "cpu")
context = lane.armed()
context.__enter__()
lane.ring(0, torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1),
          torch.ones(4, dtype=torch.int32))
lane.wait()
assert not any(name.startswith("triton") for name in sys.modules), "without a card it is not needed"
{ending}
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *sys.path], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_ops_can_be_traced_without_memory() -> None:
    """Shape functions exist: nothing is rung on the meta device."""
    state = torch.zeros(3, dtype=torch.int64, device="meta")
    hidden = torch.zeros(1, HIDDEN, device="meta")
    ids = torch.zeros(1, TOP_K, dtype=torch.int64, device="meta")
    mask = torch.zeros(EXPERTS, dtype=torch.int32, device="meta")
    ring, wait = torch.ops.moecli_offload.lane_ring, torch.ops.moecli_offload.lane_wait
    assert ring(hidden, ids, ids, mask, state, [0] * 6, 0) is None
    assert wait(state, hidden, ids[0], [0] * 5, 1) is None
