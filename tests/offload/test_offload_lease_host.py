"""Experts held in main memory, beside a device or alone; and waits across tiers that must end."""

import os
import threading

import pytest

import offload.manager
from offload.errors import OffloadError
from offload.lease import Lease
from offload.pinning import SimulatedPinner
from offload.policy import LruPolicy
from offload.slots import SlotPool
from offload.table import SlotTable
from offload.waiting import Waiting
from tests.offload.offload_files import ModelFiles, bytes_at
from tests.offload.test_offload_threads import run_threads, wait_until


def make_pool(files: ModelFiles, slots: int) -> SlotPool:
    return SlotPool(slots, files.slot_nbytes, "cpu")


def test_what_is_held_in_main_memory_stays_there(files: ModelFiles) -> None:
    manager = files.manager(3, device=make_pool(files, 2))
    with manager.lease_host(0, [4, 5]) as lease:
        for layer in (1, 2):
            manager.ensure(layer, [0, 1]).release()  # passes through the one slot that is left
            manager.check_integrity(deep=True)
        for expert, address in lease.addresses.items():
            assert bytes_at(address, files.nbytes) == files.blobs[0, expert]
            assert manager.host_address(0, expert) == address
        assert manager.resident(0) == set()
    stats = manager.stats
    assert (stats.leased_hits, stats.leased_misses) == (0, 2)
    assert (stats.requests, stats.host_misses) == (4, 4)
    manager.lease_host(0, [5]).release()
    assert manager.stats.leased_hits == 1
    manager.close()


def test_without_a_device_it_is_the_same_memory(files: ModelFiles) -> None:
    manager = files.manager(3)
    with manager.ensure(0, [1]) as asked, manager.lease_host(0, [1, 2]) as held:
        assert asked.addresses[1] == held.addresses[1]
        manager.check_integrity(deep=True)
    assert (manager.stats.requests, manager.stats.leased_hits) == (1, 1)
    manager.close()


def test_a_read_that_fails_holds_nothing(own_files: ModelFiles) -> None:
    manager = own_files.manager(3, device=make_pool(own_files, 2))
    os.truncate(own_files.path(0), own_files.spans[0, 5].offset)
    with pytest.raises(OffloadError, match="expert 5 of layer 0"):
        manager.lease_host(0, [0, 5, 1])
    assert not manager._waiting.leases
    manager.check_integrity(deep=True)
    manager.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("help_nbytes", [0, 1 << 20])
def test_loading_everything(
    files: ModelFiles, num_workers: int, help_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", help_nbytes)
    monkeypatch.setattr(offload.manager, "_LOAD_AT_ONCE", 4)
    manager = files.manager(18, device=make_pool(files, 2), num_workers=num_workers)
    manager._arena.pin(SimulatedPinner(10 * files.slot_nbytes), files.slot_nbytes)
    reports: list[tuple[int, int]] = []
    manager.load_all(lambda done, total: reports.append((done, total)))
    assert reports == [(done, 18) for done in (4, 6, 10, 12, 16, 18)]
    assert manager.stats.disk_nbytes == 18 * files.nbytes
    linked = 0
    for layer, expert in files.blobs:
        address = manager.host_address(layer, expert)
        assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
        assert manager.link_address(layer, expert) in (0, address)
        linked += manager.link_address(layer, expert) != 0
    assert linked == 10
    manager.load_all()
    manager.ensure(2, [0, 1]).release()
    assert manager.stats.disk_nbytes == 18 * files.nbytes
    manager.close()


def test_loading_everything_wants_a_slot_for_each(files: ModelFiles) -> None:
    manager = files.manager(17)
    with pytest.raises(AssertionError, match="does not hold all"):
        manager.load_all()
    assert manager.host_address(0, 0) == manager.link_address(0, 0) == 0
    manager.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_thread_that_holds_all_of_main_memory_is_told(
    files: ModelFiles, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can pass through to the device; whoever finds out, the caller hears of it."""
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)
    manager = files.manager(2, device=make_pool(files, 4), num_workers=num_workers)
    with manager.lease_host(0, [0, 1]):
        with pytest.raises(AssertionError, match="waits for slots"):
            manager.ensure(1, [0, 1, 2])
        manager.check_integrity()
        manager.ensure(0, [0, 1]).release()  # what is held can go up
    manager.ensure(1, [0, 1, 2]).release()
    manager.check_integrity(deep=True)
    manager.close()


def test_a_request_waits_for_a_slot_of_main_memory(files: ModelFiles) -> None:
    manager = files.manager(1, device=make_pool(files, 4))
    lease = manager.lease_host(0, [0])
    done: list[bytes] = []

    def other() -> None:
        with manager.ensure(1, [3]) as mine:
            done.append(bytes_at(mine.addresses[3], files.nbytes))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    wait_until(lambda: bool(manager._waiting.starved))
    manager.check_integrity()
    assert not done
    lease.release()
    thread.join(20)
    assert done == [files.blobs[1, 3]]
    manager.close()


def test_threads_that_wait_for_each_other_across_tiers_are_told(files: ModelFiles) -> None:
    """One holds main memory and wants the device, the other holds the device."""
    manager = files.manager(1, device=make_pool(files, 1))
    manager.ensure(0, [0]).release()
    both_hold = threading.Barrier(2)
    told: list[AssertionError] = []

    def ask(first: str) -> None:
        hold = manager.ensure if first == "device" else manager.lease_host
        want = manager.lease_host if first == "device" else manager.ensure
        with hold(0, [0]):
            both_hold.wait(20)
            try:
                want(0, [1]).release()
            except AssertionError as error:
                told.append(error)

    run_threads([lambda: ask("device"), lambda: ask("host")])
    # If the device's holder gives way, the other still has no slot to pass anything through.
    assert len(told) in (1, 2)
    manager.check_integrity(deep=True)
    manager.close()


def test_a_thread_that_waits_for_the_load_of_one_that_waits_for_it_is_told(
    files: ModelFiles,
) -> None:
    manager = files.manager(1, device=make_pool(files, 2))
    told: list[AssertionError] = []

    def ask() -> None:
        try:
            manager.ensure(1, [3]).release()
        except AssertionError as error:
            told.append(error)

    with manager.lease_host(0, [0]):
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        wait_until(lambda: bool(manager._waiting.starved))
        try:
            manager.ensure(1, [3]).release()  # is on its way: a hit that waits
        except AssertionError as error:
            told.append(error)
    thread.join(20)
    assert not thread.is_alive()
    assert told
    manager.check_integrity(deep=True)
    manager.close()


def test_an_interrupt_while_waiting_for_a_read_pins_nothing(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(2, device=make_pool(files, 2), disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manager._waiting, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.ensure(0, [0])
    disk.open()
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    assert manager._top.num_reclaimable == manager._host.num_reclaimable == 2
    manager.close()


def test_news_that_nobody_has_heard_yet_is_no_deadlock() -> None:
    """A thread with a lease was woken and has not run yet: one that comes now may wait for it."""
    waiting = Waiting()
    holder_waits, released = threading.Event(), threading.Event()
    table = SlotTable(LruPolicy(1), [0])

    def holder() -> None:
        with waiting.lock:
            waiting.movers.add(0)  # something goes on elsewhere
            waiting.leases.add(Lease(0, table, {}, [], lambda lease: None))
            holder_waits.set()
            waiting.wait()
            waiting.leases.clear()
            waiting.notify()
            released.set()

    thread = threading.Thread(target=holder, daemon=True)
    thread.start()
    assert holder_waits.wait(20)
    with waiting.lock:
        waiting.movers.clear()
        waiting.notify()
        while not released.is_set():
            waiting.wait()  # raised, if the holder counted as blocked for good
    thread.join(20)
    assert not thread.is_alive()


def test_many_callers_of_both_tiers(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)
    manager = files.manager(6, device=make_pool(files, 6))

    def caller(seed: int) -> None:
        for turn in range(40):
            layer, first = (seed + turn) % 3, (seed * 5 + turn) % 4
            manager.prefetch((layer + 1) % 3, [first, first + 1], to_device=bool(turn % 2))
            take = manager.lease_host if (seed + turn) % 4 == 0 else manager.ensure
            with take(layer, [first, first + 2]) as lease:
                for expert, address in lease.addresses.items():
                    assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
            manager.check_integrity()

    run_threads([lambda seed=seed: caller(seed) for seed in range(4)])
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    assert manager._top.num_reclaimable == manager._host.num_reclaimable == 6
    manager.close()
