"""Two levels: disk, main memory, and a device, here simulated in main memory."""

import os

import pytest

import offload.manager
from offload.errors import OffloadError
from offload.slots import SlotPool
from offload.trace import Trace
from tests.offload.offload_files import ModelFiles, bytes_at


def make_pool(files: ModelFiles, slots: int) -> SlotPool:
    return SlotPool(slots, files.slot_nbytes, "cpu")


def test_pool_slots_are_disjoint_and_hold_what_is_copied(files: ModelFiles) -> None:
    pool = make_pool(files, 3)
    assert pool.nbytes == 3 * files.slot_nbytes
    for slot in range(3):
        pool.copy_in(slot, memoryview(bytearray([slot + 1] * 5000)))
    for slot in range(3):
        assert pool.address(slot) == pool.address(0) + slot * files.slot_nbytes
        assert bytes_at(pool.address(slot), 5000) == bytes([slot + 1] * 5000)
        expected = bytearray([slot + 1] * 4999)
        assert pool.holds(slot, memoryview(expected))
        expected[4000] = 0
        assert not pool.holds(slot, memoryview(expected))
    with pytest.raises(AssertionError, match="no slot 3"):
        pool.address(3)
    with pytest.raises(AssertionError, match="bytes in a slot of"):
        pool.copy_in(0, memoryview(bytearray(files.slot_nbytes + 1)))
    pool.close()


def test_addresses_are_the_devices_and_hold_the_files_bytes(files: ModelFiles) -> None:
    pool = make_pool(files, 3)
    manager = files.manager(4, device=pool)
    assert manager.capacity == 3
    with manager.ensure(0, [5, 1, 2]) as lease:
        assert set(lease.addresses.values()) == {pool.address(slot) for slot in range(3)}
        for expert, address in lease.addresses.items():
            assert bytes_at(address, files.nbytes) == files.blobs[0, expert]
        manager.check_integrity(deep=True)
    stats = manager.stats
    assert (stats.misses, stats.host_hits, stats.host_misses) == (3, 0, 3)
    assert stats.disk_nbytes == stats.device_nbytes == 3 * files.nbytes
    manager.close()


def test_a_device_hit_touches_neither_disk_nor_host(files: ModelFiles) -> None:
    manager = files.manager(1, device=make_pool(files, 2))
    manager.ensure(0, [0, 1]).release()  # main memory can keep only one of them
    before = manager.stats
    manager.ensure(0, [0, 1]).release()
    delta = manager.stats - before
    assert (delta.hits, delta.misses, delta.disk_nbytes, delta.device_nbytes) == (2, 0, 0, 0)
    assert (delta.host_hits, delta.host_misses, delta.host_evictions) == (0, 0, 0)
    assert manager.stats.host_evictions == 1
    manager.check_integrity(deep=True)
    manager.close()


def test_a_device_miss_that_main_memory_has_costs_one_copy(files: ModelFiles) -> None:
    trace = Trace()
    manager = files.manager(4, device=make_pool(files, 1), trace=trace)
    for expert in (0, 1):
        manager.ensure(0, [expert]).release()
    before = manager.stats
    with manager.ensure(0, [0]) as lease:
        assert bytes_at(lease.addresses[0], files.nbytes) == files.blobs[0, 0]
    delta = manager.stats - before
    assert (delta.hits, delta.misses, delta.host_hits, delta.host_misses) == (0, 1, 1, 0)
    assert (delta.disk_nbytes, delta.device_nbytes) == (0, files.nbytes)
    assert (delta.evictions, delta.host_evictions) == (1, 0)
    assert [event.nbytes for event in trace] == [files.nbytes, files.nbytes, 0]
    manager.close()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_many_misses_pass_through_one_host_slot(
    files: ModelFiles, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)
    manager = files.manager(1, device=make_pool(files, 6), num_workers=num_workers)
    for layer in range(3):
        with manager.ensure(layer, range(6)) as lease:
            for expert, address in lease.addresses.items():
                assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
            manager.check_integrity(deep=True)
    manager.close()


def test_read_ahead_stops_in_main_memory(files: ModelFiles) -> None:
    manager = files.manager(4, device=make_pool(files, 2))
    manager.prefetch(0, [0, 1, 2])
    manager.drain_prefetch()
    assert manager.resident(0) == set()
    before = manager.stats
    manager.ensure(0, [0, 1]).release()
    delta = manager.stats - before
    assert (delta.misses, delta.host_hits, delta.prefetch_hits, delta.disk_nbytes) == (2, 2, 2, 0)
    manager.check_integrity(deep=True)
    manager.close()


def test_without_keep_no_tier_keeps(files: ModelFiles) -> None:
    manager = files.manager(2, device=make_pool(files, 3), keep=False)
    for _ in range(2):
        manager.ensure(0, [0, 1, 2]).release()
        manager.check_integrity()
    assert manager.stats.disk_nbytes == manager.stats.device_nbytes == 6 * files.nbytes
    assert manager.stats.hits == 0
    manager.close()


def test_a_failed_read_leaves_both_tiers_whole(own_files: ModelFiles) -> None:
    manager = own_files.manager(2, device=make_pool(own_files, 3))
    os.truncate(own_files.path(0), own_files.spans[0, 5].offset)
    with pytest.raises(OffloadError, match="expert 5 of layer 0"):
        manager.ensure(0, [0, 5, 1])
    manager.check_integrity(deep=True)
    manager.ensure(0, [2, 3, 4]).release()
    manager.check_integrity(deep=True)
    manager.close()


def test_a_failed_copy_leaves_both_tiers_whole(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(files, 2)
    manager = files.manager(2, device=pool)

    def broken(slot: int, source: memoryview) -> None:
        raise ValueError("a bug in the driver")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "copy_in", broken)
        with pytest.raises(ValueError, match="a bug in the driver"):
            manager.ensure(0, [3])
    manager.check_integrity(deep=True)
    manager.ensure(0, [3, 4]).release()
    manager.check_integrity(deep=True)
    manager.close()


def test_deep_check_sees_a_wrong_byte_on_the_device(files: ModelFiles) -> None:
    pool = make_pool(files, 2)
    manager = files.manager(2, device=pool)
    manager.ensure(0, [3]).release()
    manager.check_integrity(deep=True)
    pool._block += 1
    manager.check_integrity()
    with pytest.raises(AssertionError, match="expert 3 of layer 0 differs from its file"):
        manager.check_integrity(deep=True)
    manager.close()


def test_what_the_device_holds_is_not_read_ahead(files: ModelFiles) -> None:
    manager = files.manager(1, device=make_pool(files, 2))
    manager.ensure(0, [0, 1]).release()  # main memory has forgotten one of them
    before = manager.stats
    manager.prefetch(0, [0, 1])
    manager.drain_prefetch()
    assert manager.stats == before
    manager.close()
