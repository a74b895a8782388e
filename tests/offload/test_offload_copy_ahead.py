"""Guesses that go up to the device: they hide copies and harm nobody."""

import threading

import pytest

from offload.errors import OffloadError
from offload.policy import LruPolicy
from offload.slots import SlotPool
from offload.table import SlotTable
from tests.offload.late_device import LateTransfer
from tests.offload.offload_files import ModelFiles, bytes_at


class GatedTransfer(LateTransfer):
    """Copies wait, `begun` set, until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.gate = threading.Event(), threading.Event()

    def copy(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        self.begun.set()
        assert self.gate.wait(20), "nobody opened the gate"
        super().copy(*arguments)


def make_pool(files: ModelFiles, slots: int, transfer: LateTransfer | None = None) -> SlotPool:
    return SlotPool(slots, files.slot_nbytes, "cpu", transfer)


def test_what_was_copied_ahead_costs_a_request_nothing(files: ModelFiles) -> None:
    manager = files.manager(4, device=make_pool(files, 4))
    manager.prefetch(1, [2, 3], to_device=True)
    manager.drain_prefetch()
    assert manager.resident(1) == {2, 3}
    before = manager.stats
    assert (before.copied_ahead, before.device_nbytes) == (2, 2 * files.nbytes)
    assert (before.prefetch_reads, before.prefetch_hits) == (2, 2)  # read, and copied on
    with manager.ensure(1, [3, 2]) as lease:
        assert bytes_at(lease.addresses[2], files.nbytes) == files.blobs[1, 2]
    delta = manager.stats - before
    assert (delta.hits, delta.misses, delta.device_nbytes, delta.disk_nbytes) == (2, 0, 0, 0)
    assert (delta.copied_hits, delta.copied_wasted) == (2, 0)
    manager.check_integrity(deep=True)
    manager.close()


def test_a_request_does_not_copy_what_is_on_its_way(files: ModelFiles) -> None:
    gated = GatedTransfer()
    manager = files.manager(4, device=make_pool(files, 4, gated), num_workers=1)
    manager.prefetch(0, [1], to_device=True)
    assert gated.begun.wait(20)
    manager.check_integrity()
    threading.Timer(0.02, gated.gate.set).start()
    with manager.ensure(0, [1]) as lease:
        assert bytes_at(lease.addresses[1], files.nbytes) == files.blobs[0, 1]
    assert (manager.stats.hits, manager.stats.device_nbytes) == (1, files.nbytes)
    manager.close()


def test_guesses_hold_half_of_the_slots_and_the_rest_waits_in_main_memory(
    files: ModelFiles,
) -> None:
    manager = files.manager(18, device=make_pool(files, 5))
    manager.prefetch(0, range(6), to_device=True)
    manager.drain_prefetch()
    assert len(manager.resident(0)) == 2
    stats = manager.stats
    assert (stats.copied_ahead, stats.prefetch_reads, stats.copied_wasted) == (2, 6, 0)
    manager.prefetch(1, [0], to_device=True)  # an older guess for another layer makes way
    manager.drain_prefetch()
    assert manager.resident(1) == {0}
    assert len(manager.resident(0)) == 1
    assert manager.stats.copied_wasted == 1
    manager.check_integrity(deep=True)
    manager.close()


def test_a_guess_takes_no_slot_that_is_held(files: ModelFiles) -> None:
    manager = files.manager(9, device=make_pool(files, 4))
    with manager.ensure(0, [0, 1, 2]) as lease:
        manager.prefetch(1, [0, 1], to_device=True)
        manager.drain_prefetch()
        assert len(manager.resident(1)) == 1  # nor that of another guess for its layer
        assert manager.stats.copied_ahead == 1
        for expert, address in lease.addresses.items():
            assert bytes_at(address, files.nbytes) == files.blobs[0, expert]
    manager.ensure(0, [0, 1, 2, 3]).release()
    assert manager.resident(1) == set()
    assert manager.stats.copied_wasted == 1
    manager.close()


def test_a_copy_ahead_waits_for_the_kernels_that_read_its_slot(files: ModelFiles) -> None:
    late = LateTransfer()
    manager = files.manager(4, device=make_pool(files, 2, late))
    with manager.ensure(0, [0, 1]) as lease:
        for expert, address in lease.addresses.items():
            late.launch(address, files.blobs[0, expert])
    manager.prefetch(1, [0], to_device=True)
    manager.drain_prefetch()
    assert manager.stats.copied_ahead == 1
    assert late.num_waits == 2
    assert not late.overwritten
    manager.close()


def test_a_guess_that_waits_for_the_disk_can_still_be_sent_further_up(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(9, device=make_pool(files, 4), num_workers=1, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.prefetch(1, [0, 1])
    manager.prefetch(1, [1], to_device=True)
    disk.open()
    manager.drain_prefetch()
    assert manager.resident(1) == {1}
    manager.prefetch(1, [0], to_device=True)  # main memory has it already
    manager.drain_prefetch()
    assert manager.resident(1) == {0, 1}
    assert manager.stats.prefetch_reads == 3
    manager.close()


def test_a_copy_ahead_joins_a_read_that_is_under_way(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(9, device=make_pool(files, 4), num_workers=2, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.prefetch(0, [0], to_device=True)
    threading.Timer(0.02, disk.open).start()
    manager.drain_prefetch()
    assert disk.reads == [(0, 0)]
    assert manager.resident(0) == {0}
    manager.check_integrity(deep=True)
    manager.close()


@pytest.mark.parametrize("where", ["disk", "device"])
def test_a_copy_ahead_that_fails_surfaces_at_ensure(files: ModelFiles, where: str) -> None:
    disk, gated = files.gated_disk((0, 0)), GatedTransfer()
    manager = files.manager(4, device=make_pool(files, 4, gated), num_workers=1, disk=disk)
    manager.prefetch(0, [0], to_device=True)
    assert disk.begun.wait(disk.TIMEOUT_S)
    gated.fail_next = True
    gated.gate.set()
    fail = disk.open if where == "device" else lambda: disk.fail(OffloadError("it is gone"))
    threading.Timer(0.02, fail).start()
    with pytest.raises(OffloadError, match="is gone"):
        manager.ensure(0, [0])
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    assert manager.stats.prefetch_failed == 1
    assert manager._top.num_reclaimable == manager._host.num_reclaimable == 4
    gated.fail_next = False
    manager.ensure(0, [1, 2, 3]).release()
    manager.close()


def test_without_a_device_a_guess_stops_in_main_memory(files: ModelFiles) -> None:
    manager = files.manager(6)
    manager.prefetch(0, range(6), to_device=True)
    manager.drain_prefetch()
    assert manager.resident(0) == set(range(6))
    assert manager.stats.copied_ahead == manager.stats.device_nbytes == 0
    manager.close()


def test_a_device_of_one_slot_is_for_requests_alone(files: ModelFiles) -> None:
    manager = files.manager(6, device=make_pool(files, 1))
    manager.prefetch(0, [1], to_device=True)
    manager.drain_prefetch()
    assert manager.resident(0) == set()
    assert manager.stats.prefetch_reads == 1
    manager.close()


def test_the_table_gives_guesses_what_is_due_to_them() -> None:
    table = SlotTable(LruPolicy(4), [10, 20, 30, 40])
    asked = [table.reserve((0, expert)) for expert in range(3)]
    for entry in asked:
        table.finish(entry)
    first = table.reserve_guess((1, 0))
    second = table.reserve_guess((1, 1))  # evicts the expert not asked for the longest
    assert first is not None
    assert second is not None
    assert (0, 0) not in table.entries
    assert table.reserve_guess((1, 2)) is None
    assert table.reserve_guess((2, 0)) is None  # both are still being loaded
    table.finish(first)
    table.finish(second)
    assert table.reserve_guess((1, 2)) is None  # both are for its own layer
    table.note_use(second)
    third = table.reserve_guess((1, 2))
    assert third is not None
    assert (1, 0) in table.entries
    table.finish(third)
    assert table.reserve_guess((2, 0)) is not None
    assert (1, 0) not in table.entries
    assert table.ahead_wasted == 1
    table.check_integrity()
