"""Both lanes together are never slower than the better one alone, and slots follow use even so.

Times are those of `offload.lanes`, in experts of size 1; what the lanes did is what a device cache
on the simulated device decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.device_cache import DeviceCache, LaneCounts
from offload.lanes import LaneSpeeds, link_count, link_counts, link_idle

NBYTES = 1600  # of an expert: a hundred pieces
MOST = 8
NO_IDLE = [0.0] * (MOST + 1)
bandwidths = st.floats(0.1, 50)
speeds = st.builds(LaneSpeeds, bandwidths, bandwidths, st.just(inf) | bandwidths)


@dataclass(frozen=True)
class Step:
    """What one layer asked for and was served with; `brought`: beside it, in experts."""

    served: LaneCounts
    reachable: int  # of the misses
    brought: float

    @property
    def misses(self) -> int:
        return self.served.requests - self.served.hits

    @property
    def linked(self) -> int:
        return self.served.fetched + self.served.linked

    def seconds(self, lanes: LaneSpeeds) -> float:
        return lanes.seconds(self.linked + self.brought, self.served.host)

    def link_alone(self, lanes: LaneSpeeds) -> float:
        """What it cannot reach is the processor's in any case."""
        return lanes.seconds(self.reachable, self.misses - self.reachable)

    def host_alone(self, lanes: LaneSpeeds) -> float:
        return lanes.seconds(0, self.misses)


class Layer:
    """One layer's experts and its slots."""

    def __init__(
        self, num_experts: int, num_slots: int, lanes: LaneSpeeds, idle: Sequence[float]
    ) -> None:
        self.memory = torch.zeros(num_experts, NBYTES, dtype=torch.uint8)
        places = self.memory.data_ptr() + torch.arange(num_experts).view(1, -1) * NBYTES
        nbytes = [int(share * NBYTES) for share in idle]
        counts = torch.tensor(link_counts(lanes, MOST))
        sizes = (1, num_experts, num_slots, NBYTES, NBYTES)
        self.cache = DeviceCache(*sizes, "cpu", places, "lru", counts, nbytes, MOST)
        self._before = LaneCounts()

    def step(self, experts: Sequence[int]) -> Step:
        cache, before = self.cache, self._before
        here = {expert for _, expert in cache.snapshot()}
        missing = {*experts} - here
        reachable = sum(int(cache.host_addresses[0, expert]) > 0 for expert in missing)
        cache.resolve(0, torch.tensor(experts))
        brought = int(cache._fetch_count[1]) * 16 / NBYTES
        cache.fetch()
        now = self._before = cache.counters()[0]
        served = LaneCounts(
            now.hits - before.hits,
            now.fetched - before.fetched,
            now.linked - before.linked,
            now.host - before.host,
        )
        return Step(served, reachable, brought)


@settings(max_examples=60, deadline=None)
@given(
    lanes=speeds,
    vram=st.just(inf) | st.floats(1, 500),
    num_slots=st.integers(0, 6),
    out_of_reach=st.sets(st.integers(0, 9), max_size=4),
    top_k=st.integers(1, 4),
    routing=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=15),
)
def test_no_step_is_slower_than_the_better_lane_alone(
    lanes: LaneSpeeds,
    vram: float,
    num_slots: int,
    out_of_reach: set[int],
    top_k: int,
    routing: list[list[int]],
) -> None:
    layer = Layer(10, num_slots, lanes, link_idle(lanes, MOST, top_k, vram))
    for expert in out_of_reach:
        layer.cache.host_addresses[0, expert] = 0
    for experts in routing:
        step = layer.step(experts[:top_k])
        better = min(step.link_alone(lanes), step.host_alone(lanes))
        assert step.seconds(lanes) <= better * (1 + 1e-9)
        layer.cache.check_integrity(lambda key: layer.memory[key[1]].numpy().data)
        if step.brought:
            # In the processor's shadow: after it, what is in VRAM is still read in time.
            in_vram = (step.served.hits + step.linked) / vram
            on_device = (step.linked + step.brought) / lanes.link + in_vram
            assert on_device <= replace(step, brought=0.0).seconds(lanes) * (1 + 1e-9)


@given(speeds, st.integers(1, 4), st.just(inf) | st.floats(1, 500))
def test_idle_time_is_less_than_an_expert_takes(
    lanes: LaneSpeeds, choices: int, vram: float
) -> None:
    idle = link_idle(lanes, MOST, choices, vram)
    assert idle[0] == 0
    for missing, more in enumerate(idle):
        assert 0 <= more < 1
        count = link_count(missing, lanes)
        if more:
            busy = lanes.seconds(count + more, missing - count)
            assert busy <= lanes.seconds(count, missing - count) * (1 + 1e-9)


def test_idle_time_by_hand() -> None:
    assert link_idle(LaneSpeeds(1, 4), 2, 1) == (0, 0.25, 0.5)
    assert link_idle(LaneSpeeds(1, 4, ram=4.5), 2, 1) == (0, 0.125, 0.25), "memory is shared"
    assert link_idle(LaneSpeeds(1, 4), 2, 3, vram=40) == (0, 0.2, 0.475), "hits take time as well"
    assert link_idle(LaneSpeeds(1, 4), 1, 9, vram=4) == (0, 0)
    assert link_idle(LaneSpeeds(4, 0), 2, 1) == link_idle(LaneSpeeds(0, 4), 2, 1) == (0, 0, 0)
    assert link_idle(LaneSpeeds(2, 2), 3, 1) == (0, 0, 0, 0.0)


def skewed(num_experts: int, num_tokens: int, top_k: int, seed: int) -> list[list[int]]:
    """A few favourites: the n-th is asked for with probability 1 / n."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_experts, generator=generator)
    chances = (1 / torch.arange(1, num_experts + 1)).expand(num_tokens, -1)
    drawn = chances.multinomial(top_k, generator=generator)  # [tokens, k]
    chosen: list[list[int]] = order[drawn].tolist()
    return chosen


def hit_rate(steps: Sequence[Step]) -> float:
    return sum((step.served for step in steps), LaneCounts()).hit_rate or 0.0


@pytest.mark.parametrize(("host", "top_k"), [(1.2, 1), (3.0, 1), (6.0, 1), (3.0, 2)])
def test_slots_follow_use_though_the_processor_is_the_faster_lane(host: float, top_k: int) -> None:
    num_experts, num_slots, num_tokens = 32, 8, 1200
    lanes = LaneSpeeds(1.0, host)
    idle = link_idle(lanes, MOST, top_k)
    tokens = skewed(num_experts, num_tokens, top_k, seed=int(host * 10))
    rarest = [token for token in range(num_experts) if sum(token in t for t in tokens) < 25]
    warm = [(0, expert) for expert in rarest[:num_slots]]  # the worst to begin with

    def run(with_lanes: LaneSpeeds, beside: Sequence[float]) -> list[Step]:
        layer = Layer(num_experts, num_slots, with_lanes, beside)
        layer.cache.load(warm, lambda key: layer.memory[key[1]].numpy().data)
        return [layer.step(token) for token in tokens]

    found, host_alone = run(lanes, idle), run(LaneSpeeds(0.0, host), NO_IDLE)
    quarter = num_tokens // 4
    assert hit_rate(found[-quarter:]) > 0.45
    assert hit_rate(found[-quarter:]) > 3 * hit_rate(host_alone[-quarter:]), "what never changes"
    link_alone = run(LaneSpeeds(1.0, 0.0), NO_IDLE)
    assert hit_rate(found[-quarter:]) > 0.9 * hit_rate(link_alone[-quarter:])
    total = sum(step.seconds(lanes) for step in found)
    assert total < sum(step.seconds(lanes) for step in link_alone)
    assert total < sum(step.seconds(lanes) for step in host_alone)


def test_without_idle_time_nothing_would_ever_come() -> None:
    """The division alone gives single misses to the processor, so slots stay as they began."""
    layer = Layer(32, 8, LaneSpeeds(1.0, 3.0), NO_IDLE)
    layer.cache.load([(0, 0)], lambda key: layer.memory[key[1]].numpy().data)
    for token in skewed(32, 200, 1, seed=1):
        layer.step(token)
    assert set(layer.cache.snapshot()) == {(0, 0)}
