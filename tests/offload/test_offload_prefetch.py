"""Read-ahead: a help that never harms."""

import os
import threading

import pytest

import offload.ahead
from offload.errors import OffloadError
from offload.slots import SlotPool
from tests.offload.offload_files import ModelFiles, bytes_at
from tests.offload.test_offload_threads import wait_until


def test_what_was_read_ahead_is_a_hit(files: ModelFiles) -> None:
    manager = files.manager(4)
    manager.prefetch(1, [2, 3, 2])
    manager.drain_prefetch()
    before = manager.stats
    assert (before.prefetch_reads, before.disk_nbytes) == (2, 2 * files.nbytes)
    assert before.ahead_nbytes == before.disk_nbytes
    with manager.ensure(1, [3, 2]) as lease:
        assert bytes_at(lease.addresses[2], files.nbytes) == files.blobs[1, 2]
    delta = manager.stats - before
    assert (delta.hits, delta.misses, delta.disk_nbytes, delta.prefetch_hits) == (2, 0, 0, 2)
    manager.ensure(1, [3]).release()
    assert manager.stats.prefetch_hits == 2  # once each
    manager.check_integrity(deep=True)
    manager.close()


def test_what_is_on_its_way_is_a_hit_that_waits(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 1))
    manager = files.manager(2, disk=disk)
    manager.prefetch(0, [1])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.check_integrity()
    assert manager.resident(0) == {1}
    disk.open()
    with manager.ensure(0, [1]) as lease:
        assert bytes_at(lease.addresses[1], files.nbytes) == files.blobs[0, 1]
    assert (manager.stats.hits, manager.stats.misses, manager.stats.prefetch_hits) == (1, 0, 1)
    assert disk.reads == [(0, 1)]
    manager.close()


def test_nothing_is_read_ahead_where_every_slot_is_leased(files: ModelFiles) -> None:
    manager = files.manager(2)
    with manager.ensure(0, [0, 1]) as lease:
        manager.prefetch(1, [0, 1, 2])
        manager.drain_prefetch()
        for expert in (0, 1):
            assert bytes_at(lease.addresses[expert], files.nbytes) == files.blobs[0, expert]
        assert manager.stats.prefetch_reads == 0
        assert manager.stats.prefetch_dropped == 3
    manager.close()


def test_a_guess_takes_no_slot_that_a_request_waits_for(files: ModelFiles) -> None:
    manager = files.manager(2)
    first, second = manager.ensure(0, [0]), manager.ensure(0, [1])
    thread = threading.Thread(target=lambda: manager.ensure(1, [0, 1]).release(), daemon=True)
    thread.start()
    wait_until(lambda: bool(manager._waiting.starved))
    first.release()
    manager.prefetch(2, [0])
    manager.drain_prefetch()
    assert manager.resident(2) == set()
    assert manager.stats.prefetch_dropped == 1
    second.release()
    thread.join(20)
    assert not thread.is_alive()
    manager.close()


def test_guesses_that_nobody_wanted_are_counted(files: ModelFiles) -> None:
    manager = files.manager(2)
    manager.prefetch(0, [0, 1])
    manager.drain_prefetch()
    manager.ensure(1, [0, 1]).release()
    stats = manager.stats
    assert (stats.prefetch_reads, stats.prefetch_hits, stats.prefetch_wasted) == (2, 0, 2)
    manager.close()


def test_residents_are_not_read_again(files: ModelFiles) -> None:
    manager = files.manager(2)
    manager.ensure(0, [0, 1]).release()
    before = manager.stats
    manager.prefetch(0, [0, 1])
    manager.drain_prefetch()
    assert manager.stats == before
    manager.close()


def test_the_queue_is_bounded_and_the_oldest_guesses_go(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.ahead, "AHEAD_LIMIT", 3)
    disk = files.gated_disk((0, 0))
    manager = files.manager(18, num_workers=1, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.prefetch(1, [0, 1, 2])
    manager.prefetch(1, [2, 3, 4])  # 2 waits already
    assert manager.stats.prefetch_dropped == 2
    disk.open()
    manager.drain_prefetch()
    assert disk.reads == [(0, 0), (1, 2), (1, 3), (1, 4)]
    manager.close()


def test_a_layer_that_begins_settles_its_guesses(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(18, num_workers=1, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    manager.prefetch(1, [0, 1])
    manager.prefetch(2, [5])
    manager.ensure(1, [4]).release()
    disk.open()
    manager.drain_prefetch()
    assert disk.reads == [(0, 0), (1, 4), (2, 5)]
    assert manager.stats.prefetch_dropped == 2
    manager.close()


def test_cancel_drops_what_has_not_begun(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(18, num_workers=1, disk=disk)
    manager.prefetch(0, [0, 1, 2])
    assert disk.begun.wait(disk.TIMEOUT_S)
    assert manager.cancel_prefetch() == 2
    disk.open()
    manager.drain_prefetch()
    assert manager.resident(0) == {0}
    assert manager.cancel_prefetch() == 0
    manager.check_integrity(deep=True)
    manager.close()


def test_a_request_does_not_wait_behind_guesses(files: ModelFiles) -> None:
    """The only worker is stuck in a read-ahead; the caller reads its misses by itself."""
    disk = files.gated_disk((0, 0))
    manager = files.manager(18, num_workers=1, disk=disk)
    manager.prefetch(0, [0, 1])
    assert disk.begun.wait(disk.TIMEOUT_S)
    with manager.ensure(2, [0, 1, 2, 3]) as lease:
        assert len(lease.addresses) == 4
    disk.open()
    manager.close()


def test_a_request_takes_the_slot_of_a_read_ahead_when_that_ends(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(1, num_workers=1, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    disk.open()
    with manager.ensure(1, [1]) as lease:
        assert bytes_at(lease.addresses[1], files.nbytes) == files.blobs[1, 1]
    manager.close()


def test_a_failed_read_ahead_surfaces_at_ensure(own_files: ModelFiles) -> None:
    manager = own_files.manager(2)
    os.truncate(own_files.path(0), own_files.spans[0, 5].offset + 10)
    manager.prefetch(0, [5])
    manager.drain_prefetch()
    manager.check_integrity()
    assert manager.stats.prefetch_failed == 1
    assert manager.resident(0) == set()
    with pytest.raises(OffloadError, match="expert 5 of layer 0"):
        manager.ensure(0, [5])
    manager.ensure(0, [0, 1]).release()
    manager.check_integrity(deep=True)
    manager.close()


def test_a_read_ahead_that_fails_while_a_request_waits_for_it(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(2, num_workers=1, disk=disk)
    manager.prefetch(0, [0])
    assert disk.begun.wait(disk.TIMEOUT_S)
    disk.fail(OffloadError("the disk is gone", "buy one"))
    with pytest.raises(OffloadError, match="the disk is gone"):
        manager.ensure(0, [0, 1])
    manager.check_integrity(deep=True)
    assert not manager._waiting.leases
    manager.close()


@pytest.mark.parametrize("kind", ["none", "device"])
def test_without_workers_nothing_is_read_ahead(files: ModelFiles, kind: str) -> None:
    device = SlotPool(2, files.slot_nbytes, "cpu") if kind == "device" else None
    manager = files.manager(4, num_workers=0, device=device)
    manager.prefetch(0, [1])
    manager.drain_prefetch()
    assert manager.stats.prefetch_reads == 0
    manager.close()


def test_guessing_an_expert_that_does_not_exist_is_a_bug(files: ModelFiles) -> None:
    manager = files.manager(2)
    with pytest.raises(AssertionError, match="expert 77 of layer 0 is in no file"):
        manager.prefetch(0, [77])
    manager.check_integrity()
    manager.close()
