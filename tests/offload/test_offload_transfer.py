"""Copies into slots that kernels still read: they wait for exactly those kernels."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from offload.host import HostArena
from offload.pinning import SimulatedPinner
from offload.slots import SlotPool
from offload.transfer import CudaTransfer
from tests.offload.late_device import LateTransfer
from tests.offload.offload_files import PAGE, ModelFiles, bytes_at


def blob(value: int) -> memoryview:
    return memoryview(bytearray([value] * PAGE))


def test_a_copy_waits_for_the_kernels_that_read_its_slot() -> None:
    late = LateTransfer()
    pool = SlotPool(2, PAGE, "cpu", late)
    pool.copy_in(0, blob(1))
    pool.copy_in(1, blob(2))
    late.launch(pool.address(0), bytes(blob(1)))
    late.launch(pool.address(1), bytes(blob(2)))
    pool.released([0, 1])
    late.launch(pool.address(1), bytes(blob(2)))  # of another lease
    pool.copy_in(0, blob(3))
    assert late.num_waits == 2  # not for the third
    pool.released([1])
    pool.copy_in(1, blob(4))
    assert late.num_waits == 3
    assert bytes_at(pool.address(1), PAGE) == bytes(blob(4))
    pool.close()


def test_a_copy_that_failed_has_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateTransfer()
    pool = SlotPool(1, PAGE, "cpu", late)
    pool.copy_in(0, blob(1))
    late.launch(pool.address(0), bytes(blob(1)))
    pool.released([0])

    def broken(*copied: object) -> None:
        raise ValueError("a bug in the driver")

    with monkeypatch.context() as patch:
        patch.setattr(late, "copy", broken)
        with pytest.raises(ValueError, match="a bug"):
            pool.copy_in(0, blob(2))
    pool.copy_in(0, blob(2))
    assert late.num_waits == 1
    pool.close()


def test_kernels_launched_before_the_pool_was_made_are_waited_for() -> None:
    late = LateTransfer()
    old = torch.ones(PAGE, dtype=torch.uint8)
    late.launch(old.data_ptr(), b"\1" * PAGE)
    pool = SlotPool(1, PAGE, "cpu", late)
    pool.copy_in(0, blob(7))
    assert late.num_waits == 1
    pool.close()


def test_a_released_lease_leaves_its_mark(files: ModelFiles) -> None:
    """Through the manager: one device slot, whose expert is read late."""
    late = LateTransfer()
    pool = SlotPool(1, files.slot_nbytes, "cpu", late)
    manager = files.manager(2, device=pool)
    for expert in (0, 1, 1, 2):
        with manager.ensure(0, [expert]) as lease:
            late.launch(lease.addresses[expert], files.blobs[0, expert])
    assert late.num_waits == 3
    manager.close()


class Cuda:
    """What CudaTransfer uses of torch.cuda, which notes what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[tuple[str, object]] = []
        self.log = log

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.blocking = blocking

            def record(self, stream: object) -> None:
                log.append(("record", stream))

            def synchronize(self) -> None:
                log.append(("synchronize", self.blocking))

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def wait_event(self, event: object) -> None:
                log.append(("wait", event))

        @contextlib.contextmanager
        def stream(current: object) -> Iterator[None]:
            log.append(("enter", current))
            yield
            log.append(("leave", current))

        self.event_type = Event
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "compute")


class Target:
    """A tensor of the device that notes from where it was filled."""

    def __init__(self, log: list[tuple[str, object]]) -> None:
        self._log = log
        self.bytes = b""

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.bytes = bytes(source.tolist())
        self._log.append(("copy", source.data_ptr()))


def test_the_cuda_copy_runs_on_its_own_stream_after_the_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    pinner = SimulatedPinner()
    transfer = CudaTransfer("cuda:0", 2 * PAGE, pinner)
    source = torch.arange(100, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    mark = transfer.mark()
    assert cuda.log == [("record", "compute")]
    cuda.log.clear()
    target = Target(cuda.log)
    transfer.copy(target, source, mark)  # type: ignore[arg-type]
    mine = transfer._stream
    assert cuda.log == [
        ("enter", mine),
        ("wait", mark),
        ("copy", source.data_ptr()),
        ("record", mine),
        ("leave", mine),
        ("synchronize", True),
    ]
    assert target.bytes == bytes(range(100))
    assert not pinner.pieces  # no detour
    transfer.close()


@pytest.mark.parametrize("limit_nbytes", [None, 0])
def test_what_is_not_pinned_takes_a_pinned_detour(
    monkeypatch: pytest.MonkeyPatch, limit_nbytes: int | None
) -> None:
    cuda = Cuda(monkeypatch)
    pinner = SimulatedPinner(limit_nbytes)
    transfer = CudaTransfer("cuda:0", 2 * PAGE, pinner)
    for length in (100, 2 * PAGE):
        source = torch.randint(256, (length,), dtype=torch.uint8)
        target = Target(cuda.log)
        transfer.copy(target, source, None)  # type: ignore[arg-type]
        assert target.bytes == bytes(source.tolist())
    bounce = transfer._bounce
    assert isinstance(bounce, HostArena)
    copies = [place for what, place in cuda.log if what == "copy"]
    assert copies == [bounce.address(0)] * 2
    assert bool(pinner.pieces) == (limit_nbytes is None)
    assert not any(what == "wait" for what, _ in cuda.log)
    transfer.close()
    assert not pinner.pieces
