"""Several callers, workers that help, and ends: errors, interrupts, collection, exit."""

import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

import offload.manager
from offload.errors import OffloadError
from offload.manager import ExpertManager
from offload.slots import SlotPool
from offload.workers import Workers
from tests.offload.offload_files import GatedDisk, ModelFiles, bytes_at


def run_threads(tasks: list[Callable[[], None]]) -> None:
    """Run all at once; the first failure is raised here, and a hang is one."""
    failures: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@pytest.mark.parametrize("device_slots", [0, 7])
def test_many_callers_and_read_ahead(
    files: ModelFiles, device_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)
    device = SlotPool(device_slots, files.slot_nbytes, "cpu") if device_slots else None
    manager = files.manager(3 if device else 7, device=device)

    def caller(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            layer = draw.randrange(3)
            with manager.ensure(layer, draw.sample(range(6), draw.randint(1, 4))) as lease:
                manager.prefetch(draw.randrange(3), draw.sample(range(6), 2))
                for expert, address in lease.addresses.items():
                    assert bytes_at(address, files.nbytes) == files.blobs[layer, expert]
            manager.check_integrity()

    run_threads([lambda seed=seed: caller(seed) for seed in range(4)])
    manager.drain_prefetch()
    manager.check_integrity(deep=True)
    stats = manager.stats
    reads = stats.misses if device is None else stats.host_misses
    assert stats.disk_nbytes == (reads + stats.prefetch_reads) * files.nbytes
    assert manager._top.num_reclaimable == 7
    manager.close()


def test_workers_share_the_misses_of_one_request(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is stuck in its first read; the worker does all the rest meanwhile."""
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)

    class OneWaits(GatedDisk):
        def read_into(self, key: tuple[int, int], buffer: memoryview) -> int:
            nbytes = super().read_into(key, buffer)
            if len(self.reads) == 6:
                self.open()
            return nbytes

    disk = OneWaits(files.spans, [(0, 0)])
    manager = files.manager(6, num_workers=1, disk=disk)
    manager.ensure(0, range(6)).release()
    assert len(disk.threads) == 2
    manager.check_integrity(deep=True)
    manager.close()


def test_small_experts_are_read_without_waking_anybody(files: ModelFiles) -> None:
    disk = files.gated_disk()
    manager = files.manager(6, disk=disk)
    manager.ensure(0, range(6)).release()
    assert disk.threads == {threading.current_thread().name}
    manager.close()


def test_a_request_waits_until_another_thread_releases(files: ModelFiles) -> None:
    manager = files.manager(2)
    lease = manager.ensure(0, [0, 1])
    done: list[bytes] = []

    def other() -> None:
        with manager.ensure(1, [3, 4]) as mine:
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


def test_two_threads_that_wait_for_each_other_are_told(files: ModelFiles) -> None:
    manager = files.manager(2)
    both_hold = threading.Barrier(2)
    told: list[AssertionError] = []

    def greedy(layer: int) -> None:
        with manager.ensure(layer, [0]):
            both_hold.wait(20)
            try:
                manager.ensure(layer, [1]).release()
            except AssertionError as error:
                told.append(error)

    run_threads([lambda: greedy(0), lambda: greedy(1)])
    assert len(told) == 1
    manager.check_integrity()
    manager.close()


def test_two_requests_for_one_expert_read_it_once(files: ModelFiles) -> None:
    disk = files.gated_disk((0, 0))
    manager = files.manager(2, disk=disk)

    def first() -> None:
        manager.ensure(0, [0]).release()

    def second() -> None:
        assert disk.begun.wait(20)
        disk.open()
        manager.ensure(0, [0]).release()

    run_threads([first, second])
    assert disk.reads == [(0, 0)]
    assert (manager.stats.hits, manager.stats.misses) == (1, 1)
    manager.close()


@pytest.mark.parametrize("device_slots", [0, 2])
def test_both_waiters_hear_of_a_failure(files: ModelFiles, device_slots: int) -> None:
    device = SlotPool(device_slots, files.slot_nbytes, "cpu") if device_slots else None
    disk = files.gated_disk((0, 0))
    manager = files.manager(2, disk=disk, device=device)
    errors: list[OffloadError] = []

    def ask() -> None:
        with pytest.raises(OffloadError, match="gone") as caught:
            manager.ensure(0, [0, 1])
        errors.append(caught.value)

    def second() -> None:
        assert disk.begun.wait(20)
        threading.Timer(0.02, lambda: disk.fail(OffloadError("gone"))).start()
        ask()

    run_threads([ask, second])
    assert errors[0] is not errors[1]
    manager.check_integrity(deep=True)
    assert manager._top.num_reclaimable == 2
    manager.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("device_slots", [0, 5])
def test_an_interrupt_during_a_read_leaves_everything_whole(
    files: ModelFiles, num_workers: int, device_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)
    device = SlotPool(device_slots, files.slot_nbytes, "cpu") if device_slots else None

    interrupted = threading.Event()

    class Interrupted(GatedDisk):
        def read_into(self, key: tuple[int, int], buffer: memoryview) -> int:
            if threading.current_thread() is threading.main_thread() and not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt
            assert interrupted.wait(20)  # or the workers might leave the caller nothing to read
            return super().read_into(key, buffer)

    manager = files.manager(
        5, num_workers=num_workers, device=device, disk=Interrupted(files.spans, ())
    )
    with pytest.raises(KeyboardInterrupt):
        manager.ensure(0, range(5))
    manager._workers.close()
    manager.check_integrity(deep=True)
    assert manager._top.num_reclaimable == 5
    assert not manager._waiting.leases
    manager.close()


def test_a_task_that_raises_stops_no_worker() -> None:
    workers = Workers(1, "test")
    done = threading.Event()
    workers.submit(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    workers.submit(done.set)
    assert done.wait(20)
    with pytest.raises(AssertionError, match="a worker's task raised") as caught:
        workers.close()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    workers.close()


def test_urgent_tasks_go_first_and_close_drops_the_rest() -> None:
    workers = Workers(1, "test")
    gate, begun, order = threading.Event(), threading.Event(), []
    workers.submit(lambda: (begun.set(), gate.wait(20), None)[2])
    assert begun.wait(20)
    workers.submit(lambda: order.append("later"), urgent=False)
    workers.submit(lambda: order.append("urgent"))
    workers.submit(lambda: (order.append("last"), None)[1], urgent=False)
    gate.set()
    wait_until(lambda: len(order) >= 2)
    assert order[:2] == ["urgent", "later"]
    workers.close()
    with pytest.raises(AssertionError, match="closed"):
        workers.submit(gate.set)


def test_a_manager_nobody_refers_to_ends_its_threads(files: ModelFiles) -> None:
    manager: ExpertManager | None = files.manager(4)
    assert manager is not None
    manager.prefetch(0, [0, 1, 2])
    manager.drain_prefetch()
    gone = weakref.ref(manager)
    threads = manager._workers._state.threads
    assert threads
    manager = None
    gc.collect()
    for thread in threads:
        thread.join(20)
    gc.collect()
    assert gone() is None
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(0)", "del manager"])
def test_the_interpreter_exits_quietly_without_close(tmp_path: object, ending: str) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from tests.offload.offload_files import ModelFiles
files = ModelFiles(Path(sys.argv[1]), layers=2, experts=16, nbytes=1 << 18)
manager = files.manager(20)
lease = manager.ensure(0, range(8))
manager.prefetch(1, range(16))
{ending}
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *sys.path],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_bookkeeping_needs_no_torch() -> None:
    code = """
import sys
import offload.manager, offload.plan, offload.hardware, offload.bandwidth, offload.slots
heavy = {"torch", "numpy", "transformers", "rich", "quant", "moecli"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
