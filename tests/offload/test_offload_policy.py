"""Policy and slot table: order, pins, and a simulator that is no second truth."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import OffloadError
from offload.keys import ExpertKey
from offload.policy import LruPolicy
from offload.table import SlotTable
from offload.trace import Replay, Trace, TraceEvent, replay
from tests.offload.offload_files import ModelFiles


class MruPolicy(LruPolicy):
    """Evicts whoever was asked for last: as unlike LRU as can be."""

    def victim(self, is_pinned) -> ExpertKey | None:  # type: ignore[no-untyped-def]
        return next((key for key in reversed(self._order) if not is_pinned(key)), None)


def test_lru_order_and_pins() -> None:
    policy = LruPolicy(3)
    for expert in range(3):
        policy.admit((0, expert))
    policy.touch((0, 0))
    assert policy.victim(lambda key: False) == (0, 1)
    assert policy.victim(lambda key: key == (0, 1)) == (0, 2)
    assert policy.victim(lambda key: True) is None
    assert list(policy) == [(0, 1), (0, 2), (0, 0)]
    policy.remove((0, 1))
    assert policy.victim(lambda key: False) == (0, 2)
    assert len(policy) == 2


def test_lru_refuses_nonsense() -> None:
    policy = LruPolicy(1)
    policy.admit((0, 0))
    with pytest.raises(AssertionError, match="admitted twice"):
        policy.admit((0, 0))
    with pytest.raises(AssertionError, match="no room"):
        policy.admit((0, 1))
    with pytest.raises(AssertionError, match="without slots"):
        LruPolicy(0)


def test_a_failed_load_frees_its_slot_and_its_pins_do_not_count() -> None:
    table = SlotTable(LruPolicy(2), range(2))
    acquired = table.acquire(0, [0, 1])
    assert acquired is not None
    _, held, missing = acquired
    table.fail(missing[0], OSError())
    table.finish(missing[1])
    table.check_integrity()
    assert table.num_reclaimable == 1
    table.unpin(held)
    table.check_integrity()
    assert table.num_reclaimable == 2
    assert set(table.entries) == {(0, 1)}


def test_what_loads_is_no_victim_even_if_nobody_waits() -> None:
    table = SlotTable(LruPolicy(1), range(1))
    entry = table.reserve((0, 0), ahead=True)
    assert table.acquire(0, [1]) is None
    table.finish(entry)
    assert table.acquire(0, [1]) is not None
    assert (table.evictions, table.ahead_wasted, table.ahead_used) == (1, 1, 0)
    table.check_integrity()


def test_a_request_that_cannot_be_met_pins_nothing() -> None:
    table = SlotTable(LruPolicy(2), range(2))
    first = table.acquire(0, [0])
    second = table.acquire(0, [1])
    assert first is not None
    assert second is not None
    for entry in (*first[2], *second[2]):
        table.finish(entry)
    table.unpin(second[1])
    assert table.acquire(0, [1, 2]) is None
    assert table.entries[0, 1].pins == 0
    table.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table._free.append(0),
        lambda table: table._free.clear(),
        lambda table: setattr(table.entries[0, 1], "slot", table.entries[0, 0].slot),
        lambda table: table._policy.remove((0, 0)),
        lambda table: setattr(table.entries[0, 0], "pins", 1),
        lambda table: setattr(table.entries[0, 0], "ready", False),
        lambda table: setattr(table.entries[0, 0], "key", (5, 5)),
        lambda table: setattr(table.entries[0, 0], "address", 99),
        lambda table: setattr(table.entries[0, 0], "error", OSError()),
        lambda table: setattr(table, "num_loading", 1),
    ],
)
def test_integrity_check_sees_damage(damage) -> None:  # type: ignore[no-untyped-def]
    table = SlotTable(LruPolicy(3), range(3))
    acquired = table.acquire(0, [0, 1])
    assert acquired is not None
    for entry in acquired[2]:
        table.finish(entry)
    table.unpin(acquired[1])
    table.check_integrity()
    damage(table)
    with pytest.raises(AssertionError):
        table.check_integrity()


REQUESTS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=40
)


@settings(deadline=None)
@given(REQUESTS, st.integers(4, 20), st.sampled_from([LruPolicy, MruPolicy]))
def test_replay_gives_the_hits_of_the_run(
    files: ModelFiles, requests: list[tuple[int, list[int]]], capacity: int, policy: type[LruPolicy]
) -> None:
    trace = Trace()
    manager = files.manager(capacity, trace=trace, policy_factory=policy)
    for layer, experts in requests:
        manager.ensure(layer, experts).release()
    stats = manager.stats
    manager.close()
    (result,) = replay(trace, [capacity], policy)
    assert result == Replay(capacity, stats.hits, stats.misses, stats.evictions)
    assert (trace.num_hits, trace.num_requests) == (stats.hits, stats.requests)
    assert trace.nbytes == stats.disk_nbytes
    assert result.hit_rate == stats.hit_rate


def events_of(requests: list[tuple[int, list[int]]]) -> list[TraceEvent]:
    return [
        TraceEvent(step, layer, tuple(dict.fromkeys(experts)), 0, 0)
        for step, (layer, experts) in enumerate(requests)
    ]


def stack_distance_hits(keys: list[ExpertKey], capacity: int) -> int:
    """LRU by its definition: a hit is fewer than `capacity` different keys since the last time."""
    hits = 0
    for i, key in enumerate(keys):
        earlier = [j for j in range(i) if keys[j] == key]
        hits += bool(earlier) and len(set(keys[earlier[-1] + 1 : i])) < capacity
    return hits


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_lru_replay_matches_stack_distances(keys: list[ExpertKey]) -> None:
    events = events_of([(layer, [expert]) for layer, expert in keys])
    results = replay(events, range(1, 25))
    assert [r.hits for r in results] == [stack_distance_hits(keys, c) for c in range(1, 25)]
    assert all(r.hits + r.misses == len(keys) for r in results)
    assert all(a.hits <= b.hits for a, b in pairwise(results))  # LRU nests


def test_policies_differ_where_they_must() -> None:
    events = events_of([(0, [e]) for e in (0, 1, 2, 0, 1, 2, 0, 1, 2)])
    assert replay(events, [2])[0].hits == 0
    assert replay(events, [2], MruPolicy)[0].hits > 0


def test_replay_splits_requests_that_do_not_fit() -> None:
    events = events_of([(0, [0, 1, 2, 3, 4]), (0, [4, 0])])
    result = replay(events, [2])[0]
    assert (result.hits, result.misses) == (1, 6)  # only 4 was left by the last wave
    assert replay([], [2])[0].hit_rate is None


def test_trace_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    trace = Trace([TraceEvent(1, 2, (3, 4), 1, 500), TraceEvent(2, 0, (0,), 0, 0)])
    trace.save(path)
    trace.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.trace"]
    loaded = Trace.load(path)
    assert list(loaded) == list(trace)
    assert loaded.num_dropped == 0
    assert loaded.counts() == {2: {3: 1, 4: 1}, 0: {0: 1}}


def test_a_bounded_trace_keeps_the_last(tmp_path: Path) -> None:
    trace = Trace((TraceEvent(i, 0, (0,), 0, 0) for i in range(10)), limit=3)
    assert [event.step for event in trace] == [7, 8, 9]
    assert (len(trace), trace.num_dropped) == (3, 7)
    trace.save(tmp_path / "t")
    assert Trace.load(tmp_path / "t").num_dropped == 7


GOOD = '{"step":0,"layer":0,"experts":[1],"hits":0,"nbytes":0}'
HEADER = '{"format":"moecli-trace","version":1,"num_dropped":0}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no trace of version 1"),
        ("nonsense\n", "line 1 of the trace .* is no JSON object"),
        ("[]\n", "line 1 of the trace .* is no JSON object"),
        ('{"format":"moecli-trace","version":2}\n', "is no trace of version 1"),
        (f"{HEADER}\n{GOOD}\n{GOOD[:-3]}\n", "line 3 of the trace .* is no JSON object"),
        (f"{HEADER}\n{GOOD.replace('[1]', '[-1]')}\n", "line 2 of the trace .* is no request"),
        (f"{HEADER}\n{GOOD.replace('[1]', '1')}\n", "line 2 of the trace .* is no request"),
        (f"{HEADER}\n{GOOD.replace('[1]', '[true]')}\n", "line 2 of the trace .* is no request"),
        (f"{HEADER}\n{GOOD.replace('step', 'stop')}\n", "line 2 of the trace .* is no request"),
        (f'{HEADER}\n{GOOD[:-1]},"x":1}}\n', "line 2 of the trace .* is no request"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(OffloadError, match=message):
        Trace.load(path)


def test_traces_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="cannot read the trace"):
        Trace.load(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OffloadError, match="not UTF-8"):
        Trace.load(tmp_path / "binary")
    with pytest.raises(OffloadError, match="cannot write the trace"):
        Trace().save(tmp_path / "missing" / "t")
