"""A stream of experts: who comes when, what is held meanwhile, errors and ends."""

import os
import random
import threading

import pytest

import offload.manager
from offload.errors import OffloadError
from offload.lease import Lease
from offload.manager import ExpertManager
from offload.slots import SlotPool
from offload.trace import Trace, replay
from tests.offload.offload_files import ModelFiles, bytes_at
from tests.offload.test_offload_threads import run_threads, wait_until


@pytest.fixture(autouse=True)
def _workers_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)


def released(lease: Lease) -> list[int]:
    """Let the experts of a lease go; returns which they were."""
    lease.release()
    return list(lease.addresses)


def groups(manager: ExpertManager, files: ModelFiles, layer: int, wanted: range) -> list[set[int]]:
    """The experts of each lease; each lease is checked while it is held."""
    found = []
    for lease in manager.stream(layer, wanted):
        with lease:
            for expert, address in lease.addresses.items():
                assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
            assert set(lease.addresses) <= manager.resident(layer)
            manager.check_integrity(deep=True)
            found.append(set(lease.addresses))
    manager.check_integrity()
    return found


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("slots", [1, 2, 4, 18])
@pytest.mark.parametrize("on_device", [False, True])
def test_leases_cover_every_expert_once(
    files: ModelFiles, slots: int, num_workers: int, on_device: bool
) -> None:
    device = SlotPool(slots, files.slot_nbytes, "cpu") if on_device else None
    manager = files.manager(slots, num_workers=num_workers, device=device)
    for layer in (0, 1, 0):
        found = groups(manager, files, layer, range(6))
        assert sorted(expert for group in found for expert in group) == list(range(6))
    assert not manager._waiting.leases
    assert manager._top.num_reclaimable == slots
    assert manager.stats.requests == 18
    manager.close()


def test_residents_come_first_while_the_others_are_read(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0), (0, 1))
    manager = files.manager(6, num_workers=1, disk=disk)
    manager.ensure(0, [4, 5]).release()
    stream = manager.stream(0, range(4, -1, -1))
    with next(stream) as lease:
        assert set(lease.addresses) == {4}
        assert disk.begun.wait(disk.TIMEOUT_S), "nothing is read meanwhile"
        manager.check_integrity()
        disk.open()
    assert sorted(e for lease in stream for e in released(lease)) == [0, 1, 2, 3]
    assert not manager._waiting.leases


def test_what_has_come_need_not_wait_for_what_has_not(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(6, num_workers=1, disk=disk)
    stream = manager.stream(0, range(3))
    assert disk.begun.wait(disk.TIMEOUT_S)
    early = set()
    while early < {1, 2}:
        with next(stream) as lease:
            early |= set(lease.addresses)
    assert early == {1, 2}
    disk.open()
    assert [released(lease) for lease in stream] == [[0]]
    manager.check_integrity(deep=True)
    manager.close()


def test_the_next_experts_are_read_while_a_full_cache_is_worked_on(files: ModelFiles) -> None:
    """Two slots: as one is released, the worker fills it, whatever the caller does meanwhile."""
    disk = files.gated_disk()
    manager = files.manager(2, num_workers=1, disk=disk)
    stream = manager.stream(0, range(6))
    done = 0
    for lease in stream:
        with lease:
            done += len(lease.addresses)
            ahead = min(6, done + 2 - len(lease.addresses))
            wait_until(lambda ahead=ahead: len(disk.reads) >= ahead)
            manager.check_integrity()
    assert disk.reads == [(0, expert) for expert in range(6)]


def test_half_of_the_slots_at_most_are_held_by_one_lease(files: ModelFiles) -> None:
    manager = files.manager(4, num_workers=0)
    manager.ensure(0, range(4)).release()
    stream = manager.stream(0, range(4))
    assert stream.room == 0
    with next(stream) as lease:
        assert set(lease.addresses) == {0, 1}
    assert stream.room == 2
    assert released(next(stream)) == [2, 3]
    assert stream.room == 4
    stream = manager.stream(0, range(6))
    assert stream.room == 0
    stream.close()
    manager.close()


def test_small_experts_come_in_one_group_read_by_the_caller(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 1 << 20)
    disk = files.gated_disk()
    manager = files.manager(4, disk=disk)
    assert groups(manager, files, 0, range(6)) == [{0, 1}, {2, 3}, {4, 5}]
    assert disk.threads == {threading.current_thread().name}
    manager.close()


def test_counts_and_trace_are_those_of_ensure(files: ModelFiles) -> None:
    draw = random.Random(3)
    wanted = [(draw.randrange(3), draw.sample(range(6), 3)) for _ in range(60)]
    traces = []
    for streams in (False, True):
        trace = Trace()
        manager = files.manager(5, trace=trace)
        for layer, experts in wanted:
            if streams:
                for lease in manager.stream(layer, experts):
                    lease.release()
            else:
                manager.ensure(layer, manager.waves(layer, experts)[0]).release()
        assert replay(trace, [5])[0].hits == manager.stats.hits
        traces.append((list(trace), manager.stats))
        manager.close()
    assert traces[0] == traces[1]


def test_an_error_ends_the_stream_and_lets_go_of_all(own_files: ModelFiles) -> None:
    manager = own_files.manager(3)
    os.truncate(own_files.path(0), own_files.spans[0, 4].offset + 10)
    stream = manager.stream(0, range(6))
    with pytest.raises(OffloadError, match="expert 4 of layer 0"):
        list(map(released, stream))
    wait_until(lambda: not manager._top.num_loading)
    manager.check_integrity(deep=True)
    assert not manager._waiting.leases
    assert manager._top.num_reclaimable == 3
    with pytest.raises(StopIteration):
        next(stream)
    manager.close()


def test_a_stream_that_is_closed_early_holds_nothing(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(4, num_workers=1, disk=disk)
    stream = manager.stream(0, range(6))
    assert disk.begun.wait(disk.TIMEOUT_S)
    waiting: list[BaseException] = []

    def other() -> None:
        try:
            manager.ensure(0, [3]).release()
        except OffloadError as error:
            waiting.append(error)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    wait_until(lambda: manager.stats.requests == 5)
    stream.close()
    stream.close()
    thread.join(20)
    assert "was interrupted" in str(waiting[0])
    disk.open()
    wait_until(lambda: not manager._top.num_loading)
    manager.check_integrity(deep=True)
    assert manager.resident(0) == {0}
    manager.ensure(0, [1, 2, 3, 4]).release()
    manager.close()


def test_asking_on_without_release_is_told_when_it_cannot_end(files: ModelFiles) -> None:
    manager = files.manager(2)
    stream = manager.stream(0, range(6))
    held = []
    with pytest.raises(AssertionError, match="only its own thread's leases"):
        held.extend(stream)
    for lease in held:
        lease.release()
    manager.check_integrity()
    manager.close()


def test_guesses_take_no_slot_that_a_stream_waits_for(files: ModelFiles) -> None:
    disk = files.gated_disk((1, 0))
    manager = files.manager(2, num_workers=1, disk=disk)
    manager.prefetch(1, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.prefetch(0, [0, 1])
    stream = manager.stream(0, range(3))
    manager.prefetch(2, [0, 1])
    assert manager.stats.prefetch_dropped == 2, "its own guesses are settled"
    disk.open()
    assert sorted(e for lease in stream for e in released(lease)) == [0, 1, 2]
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    manager.close()


def _released(lease: offload.manager.Lease) -> list[int]:
    lease.release()
    return list(lease.addresses)


def test_streams_and_requests_of_many_threads(files: ModelFiles) -> None:
    manager = files.manager(7, num_workers=2)

    def caller(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            layer, count = draw.randrange(3), draw.randint(1, 6)
            experts = draw.sample(range(6), count)
            if seed % 2:
                manager.ensure(layer, experts[:2]).release()
                continue
            came = []
            for lease in manager.stream(layer, experts):
                with lease:
                    manager.prefetch(draw.randrange(3), draw.sample(range(6), 2))
                    for expert, address in lease.addresses.items():
                        assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
                        came.append(expert)
            assert sorted(came) == sorted(experts)
            manager.check_integrity()

    run_threads([lambda seed=seed: caller(seed) for seed in range(4)])
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    assert manager._top.num_reclaimable == 7
    manager.close()


def test_a_stream_of_a_closed_manager_is_a_bug(files: ModelFiles) -> None:
    manager = files.manager(2)
    manager.close()
    with pytest.raises(AssertionError, match="closed"):
        manager.stream(0, [0])
