"""Residency as the device decides it is the host policy's, by reference and by kernel."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from offload import device_ops
from offload.device_cache import DeviceCache, LaneCounts
from offload.errors import OffloadError
from offload.keys import ExpertKey
from tests.devices import examples
from tests.offload.device_twin import (
    EXPERT_NBYTES,
    SLOT_NBYTES,
    Experts,
    HostTwin,
    bytes_read,
    step,
)


@pytest.fixture(autouse=True)
def _backend_as_it_was() -> Iterator[None]:
    yield
    device_ops.set_backend("auto")


class DeviceCacheMachine(RuleBasedStateMachine):
    """Random routings, budgets, divisions of the misses, addresses that come and go."""

    experts: Experts  # set by the test below

    @initialize(
        placement=st.sampled_from(["lru", "lru", "pinned"]),
        num_slots=st.integers(0, 9),
        shares=st.lists(st.integers(0, 8), min_size=9, max_size=9),
        unreachable=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=3),
        idle=st.lists(st.integers(0, 50), min_size=8, max_size=8),
        warm=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), unique=True, max_size=9),
    )
    def start(
        self,
        placement: str,
        num_slots: int,
        shares: list[int],
        idle: list[int],
        unreachable: set[ExpertKey],
        warm: list[ExpertKey],
    ) -> None:
        idle = [0, *idle]
        counts = [min(share, misses) for misses, share in enumerate(shares)]
        self.cache = self.experts.cache(num_slots, placement, counts, idle=idle)
        self.twin = HostTwin(self.cache, idle)
        self.asked = [[0] * 6 for _ in range(2)]
        for key in unreachable:
            self.cache.host_addresses[key] = 0
        warm = warm[: min(num_slots, len(warm))]
        self.cache.load(warm, self.experts.read)
        self.twin.load(warm)

    @rule(layer=st.integers(0, 1), ids=st.lists(st.integers(0, 5), min_size=1, max_size=8))
    def step(self, layer: int, ids: list[int]) -> None:
        got = step(self.cache, layer, ids)
        assert got == self.twin.step(layer, ids)
        for expert in set(ids):
            self.asked[layer][expert] += 1
        for expert, address in got[0].items():
            assert bytes_read(self.cache, address) == self.experts.read((layer, expert))

    @rule(key=st.tuples(st.integers(0, 1), st.integers(0, 5)), reachable=st.booleans())
    def move(self, key: ExpertKey, reachable: bool) -> None:
        self.cache.host_addresses[key] = self.experts.addresses[key] * reachable

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity(self.experts.read)
        assert self.cache.snapshot() == self.twin.residents()
        assert self.cache.num_arrived == self.twin.num_arrived
        assert self.cache.counters() == list(self.twin.counts.values())
        assert self.cache.requests() == self.asked


@pytest.mark.parametrize(
    ("backend", "num_examples", "num_steps"), [("torch", 100, 25), ("triton", 25, 20)]
)
def test_random_use(backend: str, num_examples: int, num_steps: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    device_ops.set_backend(backend)
    DeviceCacheMachine.experts = Experts(2, 6)
    phases = set(Phase) - ({Phase.shrink, Phase.explain} if backend == "triton" else set())
    steps = settings(
        max_examples=examples(num_examples),
        stateful_step_count=num_steps,
        deadline=None,
        phases=phases,  # a failure is not made small in the interpreter: it takes minutes
    )
    run_state_machine_as_test(DeviceCacheMachine, settings=steps)


def test_misses_are_divided_in_the_order_asked_and_duplicates_count_once() -> None:
    experts = Experts(1, 8)
    cache = experts.cache(4, counts=[0, 1, 1, 2, 2], max_choices=4)
    cache.host_addresses[0, 7] = 0
    addresses, host = step(cache, 0, [7, 3, 3, 1])  # two of three are the link's: those in reach
    assert set(addresses) == {3, 1}
    assert host == {7}
    addresses, host = step(cache, 0, [3, 1, 0, 2])
    assert set(addresses) == {3, 1, 0}
    assert host == {2}
    (counts,) = cache.counters()
    assert counts == LaneCounts(hits=2, fetched=3, linked=0, host=2)
    assert counts.requests == 7
    assert counts.hit_rate == pytest.approx(2 / 7)
    assert LaneCounts().hit_rate is None


ONE_ALONE_IS_THE_HOSTS = [0, 0, 1, 2, 3, 4, 5, 6, 7]
A_PIECE = [0, *[16] * 8]  # of three, beside each step with a miss


def coming(cache: DeviceCache) -> tuple[int, int, int] | None:
    """Expert, slot and pieces of what comes piece by piece."""
    cache.check_integrity(None)
    expert, slot, pieces, _ = cache._arrival.tolist()
    return None if expert < 0 else (expert, slot, pieces)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    device_ops.set_backend(request.param)
    return str(request.param)


def test_the_host_s_expert_comes_piece_by_piece_into_the_oldest_slot(backend: str) -> None:
    experts = Experts(2, 8)
    cache = experts.cache(2, counts=ONE_ALONE_IS_THE_HOSTS, idle=A_PIECE)
    cache.load([(0, 0), (0, 1)], experts.read)
    assert step(cache, 0, [5]) == ({}, {5})
    assert coming(cache) == (5, 0, 1)
    assert set(cache.snapshot()) == {(0, 1)}, "the oldest has left at once"
    step(cache, 0, [1])
    assert coming(cache) == (5, 0, 1), "a step without a miss has no time for it"
    step(cache, 1, [3])
    assert coming(cache) == (5, 0, 2), "one at a time, in the time of any layer"
    assert step(cache, 0, [5]) == ({}, {5}), "it is not there until after this step"
    assert coming(cache) is None
    assert (set(cache.snapshot()), cache.num_arrived) == ({(0, 1), (0, 5)}, 1)
    cache.check_integrity(experts.read)
    assert step(cache, 0, [5])[1] == set()


def test_what_comes_is_given_up_where_the_link_brings_it_whole(backend: str) -> None:
    experts = Experts(1, 8)
    cache = experts.cache(3, counts=ONE_ALONE_IS_THE_HOSTS, idle=A_PIECE)
    step(cache, 0, [5])
    step(cache, 0, [6, 5])
    assert coming(cache) == (5, 0, 2)
    step(cache, 0, [5, 7])
    assert coming(cache) == (7, 2, 1), "the next that is the host's"
    slots = {
        e: (a - cache._slots.data_ptr()) // SLOT_NBYTES for (_, e), a in cache.snapshot().items()
    }
    assert slots == {5: 0, 6: 1}, "its slot was free for it"
    cache.check_integrity(experts.read)


def test_what_comes_is_given_up_where_its_source_goes(backend: str) -> None:
    experts = Experts(1, 8)
    cache = experts.cache(3, counts=ONE_ALONE_IS_THE_HOSTS, idle=A_PIECE)
    step(cache, 0, [5])
    cache.host_addresses[0, 5] = 0
    step(cache, 0, [6])
    assert coming(cache) == (6, 0, 1)
    cache.host_addresses[0, 6] = 0
    assert step(cache, 0, [6]) == ({}, {6})
    assert coming(cache) is None
    assert cache.snapshot() == {}


def test_what_comes_makes_way_where_its_slot_is_the_oldest(backend: str) -> None:
    experts = Experts(1, 8)
    cache = experts.cache(1, counts=ONE_ALONE_IS_THE_HOSTS, idle=A_PIECE)
    step(cache, 0, [5])
    assert coming(cache) == (5, 0, 1)
    addresses, host = step(cache, 0, [6, 7])
    assert (set(addresses), host) == ({6}, {7})
    assert coming(cache) is None
    assert set(cache.snapshot()) == {(0, 6)}
    cache.check_integrity(experts.read)


def test_what_finds_no_slot_is_read_in_place() -> None:
    experts = Experts(1, 8)
    cache = experts.cache(2)
    step(cache, 0, [0, 1])
    addresses, host = step(cache, 0, [5, 0, 6, 7])
    assert addresses[6] == experts.addresses[0, 6]
    assert addresses[7] == experts.addresses[0, 7]
    assert set(cache.snapshot()) == {(0, 0), (0, 5)}
    assert not host
    assert cache.counters() == [LaneCounts(hits=1, fetched=3, linked=2)]


def test_no_slots_at_all() -> None:
    experts = Experts(1, 4)
    cache = experts.cache(0)
    assert step(cache, 0, [2]) == ({2: int(experts.addresses[0, 2])}, set())
    assert cache.snapshot() == {}
    assert cache.nbytes == 0
    cache.check_integrity(experts.read)


def test_load_fills_free_slots_and_the_first_is_the_first_to_go() -> None:
    experts = Experts(2, 4)
    cache = experts.cache(3)
    step(cache, 0, [2])
    cache.load([(1, 3), (0, 0)], experts.read)
    cache.check_integrity(experts.read)
    assert list(cache.snapshot()) == [(0, 2), (1, 3), (0, 0)]
    for new, gone in ((0, (0, 2)), (1, (1, 3)), (2, (0, 0))):
        assert gone in cache.snapshot()
        step(cache, 1, [new])
        assert gone not in cache.snapshot()
    cache.check_integrity(experts.read)


def test_load_takes_any_bytes() -> None:
    experts = Experts(1, 3)
    cache = experts.cache(3, "pinned")
    cache.load([(0, 0)], experts.read)
    cache.load([(0, 1)], lambda key: memoryview(bytearray(experts.read(key) + b"more")))
    cache.load([(0, 2)], lambda key: memoryview(experts.memory[key].numpy()))
    cache.load([], experts.read)
    cache.check_integrity(experts.read)


def test_a_load_that_fails_leaves_nobody_half_there() -> None:
    experts = Experts(1, 4)
    cache = experts.cache(4)

    def read(key: ExpertKey) -> bytes:
        if key == (0, 2):
            raise OSError("the disk is gone")
        return experts.read(key)

    with pytest.raises(OSError, match="the disk is gone"):
        cache.load([(0, 1), (0, 2)], read)
    assert cache.snapshot() == {}
    cache.check_integrity(experts.read)
    with pytest.raises(AssertionError, match="expert 3 of layer 0 has 5 bytes"):
        cache.load([(0, 3)], lambda key: b"short")
    with pytest.raises(AssertionError, match="5 experts for 4 free slots"):
        cache.load([(0, 0)] * 5, experts.read)
    with pytest.raises(AssertionError, match="loaded twice"):
        cache.load([(0, 0)] * 2, experts.read)
    cache.load([(0, 0)], experts.read)
    with pytest.raises(AssertionError, match="that is resident"):
        cache.load([(0, 0)], experts.read)


def damaged(cache: DeviceCache, name: str, at: Any, value: int) -> None:
    table: Tensor = getattr(cache, name)
    table[at] = value


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("_slot_of", (0, 1), 0, "slot 0 does not own expert 1 of layer 0"),
        ("_slot_of", (0, 1), 3, "expert 1 of layer 0 is in slot 3"),
        ("_slot_of", (0, 2), -1, "a slot holds an expert that is elsewhere"),
        ("_owner", 1, 5, "does not own"),
        ("_owner", 2, 2, "a slot holds an expert that is elsewhere"),
        ("_stamp", 0, 2, "two experts were asked for at one time"),
        ("_stamp", 0, 99, "a stamp is not of the past"),
        ("_stamp", 2, 1, "a free slot was asked for"),
        ("_slots", SLOT_NBYTES + EXPERT_NBYTES - 1, 0, "expert 4 of layer 0 is damaged"),
    ],
)
def test_each_damage_is_seen(name: str, at: Any, value: int, message: str) -> None:
    experts = Experts(1, 6)
    experts.memory[0, 4, EXPERT_NBYTES - 1] = 9
    cache = experts.cache(3)
    step(cache, 0, [2, 4])
    cache._stamp[:2] = torch.tensor([1, 2])
    cache.check_integrity(experts.read)
    damaged(cache, name, at, value)
    with pytest.raises(AssertionError, match=message):
        cache.check_integrity(experts.read)


def test_wrong_use_is_refused() -> None:
    cache = Experts(2, 4).cache(2, max_choices=2)
    for layer, ids, message in (
        (2, torch.tensor([0]), "no layer 2"),
        (0, torch.tensor([0, 1, 2]), "3 choices"),
        (0, torch.tensor([0], dtype=torch.int32), "choices of type"),
        (0, torch.zeros(2, 2, dtype=torch.int64)[:, 0], "not contiguous"),
    ):
        with pytest.raises(AssertionError, match=message):
            cache.resolve(layer, ids)
    with pytest.raises(AssertionError, match="too few link counts"):
        Experts(1, 4).cache(2, counts=[0, 1], max_choices=2)
    with pytest.raises(OffloadError, match="no kernels are called `cuda`"):
        device_ops.set_backend("cuda")
    assert device_ops.current_backend() == "auto"


def test_a_device_without_room_is_the_users_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: Any, **kind: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(OffloadError, match=r"has no 0\.00 GiB free for experts") as caught:
        Experts(1, 4).cache(2)
    assert caught.value.hint is not None


def test_closing_gives_the_slots_back() -> None:
    cache = Experts(1, 4).cache(2)
    cache.close()
    assert cache._slots.numel() == 0
