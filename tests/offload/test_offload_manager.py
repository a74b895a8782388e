"""One caller: hits and misses, leases, waves, errors."""

import os

import pytest

from offload.errors import OffloadError
from offload.trace import Trace
from tests.offload.offload_files import ModelFiles, bytes_at


def test_ensure_gives_the_bytes_of_the_file(files: ModelFiles) -> None:
    manager = files.manager(4)
    with manager.ensure(1, [3, 0, 5]) as lease:
        assert list(lease.addresses) == [3, 0, 5]
        for expert, address in lease.addresses.items():
            assert address % 4096 == 0
            assert bytes_at(address, files.nbytes) == files.blobs[1, expert]
        manager.check_integrity(deep=True)
    assert manager.stats.misses == 3
    assert manager.stats.disk_nbytes == 3 * files.nbytes
    manager.close()


def test_resident_experts_are_hits_and_read_nothing(files: ModelFiles) -> None:
    manager = files.manager(4)
    manager.ensure(0, [0, 1]).release()
    before = manager.stats
    with manager.ensure(0, [1, 0, 1]) as lease:
        assert set(lease.addresses) == {0, 1}
    delta = manager.stats - before
    assert (delta.hits, delta.misses, delta.disk_nbytes) == (2, 0, 0)
    assert delta.hit_rate == 1.0
    manager.close()


def test_the_least_recent_goes(files: ModelFiles) -> None:
    manager = files.manager(2)
    for expert in (0, 1, 0, 2):
        manager.ensure(0, [expert]).release()
    assert manager.resident(0) == {0, 2}
    assert manager.stats.evictions == 1
    manager.close()


def test_a_leased_expert_is_never_moved_or_overwritten(files: ModelFiles) -> None:
    manager = files.manager(2)
    with manager.ensure(0, [0]) as lease:
        for expert in (1, 2, 3, 4):
            manager.ensure(0, [expert]).release()
            assert bytes_at(lease.addresses[0], files.nbytes) == files.blobs[0, 0]
        with manager.ensure(0, [0]) as again:
            assert again.addresses == lease.addresses
    manager.close()


def test_two_leases_of_one_expert_hold_it_until_both_end(files: ModelFiles) -> None:
    manager = files.manager(1)
    first, second = manager.ensure(0, [0]), manager.ensure(0, [0])
    first.release()
    first.release()
    manager.check_integrity()
    with pytest.raises(AssertionError, match="only its own thread's leases"):
        manager.ensure(0, [1])
    second.release()
    manager.ensure(0, [1]).release()
    manager.check_integrity()
    manager.close()


def test_more_experts_than_slots_is_a_bug_of_the_caller(files: ModelFiles) -> None:
    manager = files.manager(2)
    for _ in range(2):
        with pytest.raises(AssertionError, match="3 experts asked for at once"):
            manager.ensure(0, [0, 1, 2])
        manager.check_integrity()
        manager.ensure(0, [1]).release()
    manager.close()


@pytest.mark.parametrize("trace", [None, Trace()])
def test_an_expert_that_does_not_exist_is_a_bug(files: ModelFiles, trace: Trace | None) -> None:
    manager = files.manager(2, trace=trace)
    with pytest.raises(AssertionError, match="expert 77 of layer 0 is in no file"):
        manager.ensure(0, [0, 77])
    manager.check_integrity(deep=True)
    manager.ensure(1, [0, 1]).release()
    manager.close()


def test_waves_take_residents_first_and_fit(files: ModelFiles) -> None:
    manager = files.manager(2)
    manager.ensure(0, [4, 3]).release()
    assert manager.waves(0, [0, 1, 2, 3, 4, 4]) == [[3, 4], [0, 1], [2]]
    assert manager.waves(0, []) == []
    manager.close()


def test_without_keep_everything_is_read_each_time(files: ModelFiles) -> None:
    manager = files.manager(2, keep=False)
    for _ in range(3):
        with manager.ensure(0, [0, 1]) as lease:
            for expert in (0, 1):
                assert bytes_at(lease.addresses[expert], files.nbytes) == files.blobs[0, expert]
        manager.prefetch(0, [0])
        manager.check_integrity()
        assert manager.resident(0) == set()
    assert (manager.stats.hits, manager.stats.misses) == (0, 6)
    assert manager.stats.disk_nbytes == 6 * files.nbytes
    manager.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failed_read_names_file_and_expert_and_loses_no_slot(
    own_files: ModelFiles, num_workers: int
) -> None:
    manager = own_files.manager(4, num_workers=num_workers)
    manager.ensure(0, [1]).release()
    os.truncate(own_files.path(0), own_files.spans[0, 4].offset + 100)
    with pytest.raises(OffloadError, match=r"layer0\.bin.*expert 4 of layer 0: 100 of 5000"):
        manager.ensure(0, [1, 2, 4, 3])
    manager.check_integrity(deep=True)
    assert 4 not in manager.resident(0)
    with manager.ensure(0, [0, 1, 2, 3]) as lease:  # all four slots are usable
        assert len(lease.addresses) == 4
    manager.check_integrity(deep=True)
    manager.close()


def test_trace_records_each_request(files: ModelFiles) -> None:
    trace = Trace()
    manager = files.manager(2, trace=trace)
    manager.begin_step()
    manager.ensure(0, [1, 0, 1]).release()
    manager.begin_step()
    manager.ensure(0, [1]).release()
    assert [tuple(event) for event in trace] == [
        (1, 0, (1, 0), 0, 2 * files.nbytes),
        (2, 0, (1,), 1, 0),
    ]
    manager.close()


def test_close_refuses_while_leases_are_held_then_works(files: ModelFiles) -> None:
    manager = files.manager(2)
    lease = manager.ensure(0, [0])
    with pytest.raises(AssertionError, match="1 leases are held"):
        manager.close()
    assert bytes_at(lease.addresses[0], files.nbytes) == files.blobs[0, 0]
    lease.release()
    manager.close()
    manager.close()
    with pytest.raises(AssertionError, match="closed"):
        manager.ensure(0, [0])
