"""Copies into slots that kernels still read: they wait for exactly those kernels."""

import contextlib
from collections.abc import Iterator
from ctypes import (
    POINTER,
    Structure,
    c_int,
    c_size_t,
    c_uint64,
    c_void_p,
    cast,
    memmove,
)
from types import SimpleNamespace

import pytest
import torch

from offload.copy2d import CopyRuns
from offload.host import HostArena
from offload.pieces import Piece
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
    """A tensor of the device that notes from where it was filled, and its views how."""

    def __init__(self, log: list[tuple[str, object]], nbytes: int) -> None:
        self._log = log
        self.memory = torch.zeros(nbytes, dtype=torch.uint8)

    def numel(self) -> int:
        return self.memory.numel()

    def storage_offset(self) -> int:
        return 0

    def as_strided(self, *view: object) -> "Target":
        part = Target(self._log, 0)
        part.memory = self.memory.as_strided(*view)  # type: ignore[arg-type]
        return part

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        assert self.memory.shape[0] == 1, "torch does not copy what lies apart"
        self.memory.copy_(source)
        self._log.append(("copy", source.data_ptr()))


def whole(nbytes: int) -> tuple[Piece, ...]:
    return (Piece(0, nbytes),)


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
    target = Target(cuda.log, 100)
    pieces = (Piece(0, 30), Piece(40, 60))
    transfer.copy(target, source, mark, pieces)  # type: ignore[arg-type]
    mine = transfer._stream
    assert cuda.log == [
        ("enter", mine),
        ("wait", mark),
        ("copy", source.data_ptr()),
        ("copy", source.data_ptr() + 40),
        ("record", mine),
        ("leave", mine),
        ("synchronize", True),
    ]
    assert target.memory.tolist() == [*range(30), *[0] * 10, *range(40, 100)]
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
        target = Target(cuda.log, length)
        transfer.copy(target, source, None, whole(length))  # type: ignore[arg-type]
        assert torch.equal(target.memory, source)
    bounce = transfer._bounce
    assert isinstance(bounce, HostArena)
    copies = [place for what, place in cuda.log if what == "copy"]
    assert copies == [bounce.address(0)] * 2
    assert bool(pinner.pieces) == (limit_nbytes is None)
    assert not any(what == "wait" for what, _ in cuda.log)
    transfer.close()
    assert not pinner.pieces


class FakeDriver:
    """Reads what the driver is told as its manual has it, field by field, and does it."""

    _NAMES = ("x", "y", "kind", "host", "device", "array", "pitch")
    _KINDS = (c_size_t, c_size_t, c_int, c_void_p, c_uint64, c_void_p, c_size_t)

    class Copy(Structure):
        pass

    def __init__(self) -> None:
        sides = [(f"{side}_{name}", kind) for side in ("src", "dst") for name, kind in self.each()]
        self.Copy._fields_ = [*sides, ("width", c_size_t), ("height", c_size_t)]
        self.streams: list[int | None] = []

    def each(self) -> Iterator[tuple[str, type]]:
        return zip(self._NAMES, self._KINDS, strict=True)

    def cuMemcpy2DAsync_v2(self, copy: object, stream: c_void_p) -> int:
        told = cast(copy, POINTER(self.Copy)).contents
        assert (told.src_kind, told.dst_kind) == (1, 2), "from the host to the device"
        assert not any((told.src_x, told.src_y, told.src_array, told.src_device))
        assert not any((told.dst_x, told.dst_y, told.dst_array, told.dst_host))
        if told.width > told.src_pitch or told.width > told.dst_pitch:
            return 1
        for run in range(told.height):
            target = told.dst_device + run * told.dst_pitch
            memmove(target, told.src_host + run * told.src_pitch, told.width)
        self.streams.append(stream.value)
        return 0


def test_runs_that_lie_apart_are_one_copy_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr("offload.copy2d.load_driver", lambda: driver)
    asked: list[str] = []
    stream = SimpleNamespace(query=lambda: asked.append("context"), cuda_stream=77)
    source = torch.randint(1, 256, (1000,), dtype=torch.uint8)
    target = torch.zeros(1000, dtype=torch.uint8)
    piece = Piece(100, 30, 9, 100)
    CopyRuns()(piece.of(target), piece.of(source), stream)  # type: ignore[arg-type]
    assert (driver.streams, asked) == ([77], ["context"])
    assert torch.equal(piece.of(target), piece.of(source))
    assert int(target.count_nonzero()) == piece.total_nbytes
    overlapping = target.as_strided((2, 30), (20, 1))
    with pytest.raises(AssertionError, match="2 runs of 30 bytes failed: error 1"):
        CopyRuns()(overlapping, piece.of(source)[:2], stream)  # type: ignore[arg-type]


@pytest.mark.parametrize("pinned", [True, False])
def test_the_cuda_copy_leaves_runs_to_the_driver(
    monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """From the source itself, or from the same place in the pinned buffer."""
    cuda = Cuda(monkeypatch)
    pieces = (Piece(10, 20), Piece(50, 10, 3, 40))
    source = torch.randint(1, 256, (200,), dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    transfer = CudaTransfer("cuda:0", PAGE, SimulatedPinner())
    target = Target(cuda.log, 200)

    def by_the_driver(into: Target, out_of: torch.Tensor, stream: object) -> None:
        assert stream is transfer._stream
        into.memory.copy_(out_of)
        cuda.log.append(("runs", out_of.data_ptr()))

    monkeypatch.setattr(transfer, "_copy_runs", by_the_driver)
    cuda.log.clear()
    transfer.copy(target, source, None, pieces)  # type: ignore[arg-type]
    start = source.data_ptr()
    if not pinned:
        assert transfer._bounce is not None
        start = transfer._bounce.address(0)
    steps = [("copy", start + 10), ("runs", start + 50), ("record", transfer._stream)]
    assert cuda.log[1:4] == steps
    for piece in pieces:
        assert torch.equal(piece.of(target.memory), piece.of(source))
    assert int(target.memory.count_nonzero()) == 50
    transfer.close()
