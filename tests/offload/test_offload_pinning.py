"""Pinning: as much as the system allows, never a slot by half, and all let go at the end."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

import offload.pinning
from offload.host import HostArena, pinnable_nbytes
from offload.pinning import CudaPinner, SimulatedPinner
from tests.offload.offload_files import PAGE, bytes_at


class FarPinner(SimulatedPinner):
    """A device that sees pinned memory elsewhere, and each piece somewhere else again."""

    def device_address(self, address: int) -> int:
        super().device_address(address)
        return address + (1 << 50) + (list(self.pieces).index(address) << 45)


@given(
    slots=st.integers(1, 20),
    slot_pages=st.integers(1, 3),
    step_nbytes=st.integers(1, 30 * PAGE),
    limit_nbytes=st.integers(0, 70 * PAGE),
)
def test_whole_slots_are_pinned_from_the_first_on(
    slots: int, slot_pages: int, step_nbytes: int, limit_nbytes: int
) -> None:
    slot_nbytes = slot_pages * PAGE
    arena = HostArena(slots * slot_nbytes, slot_nbytes)
    pinner = FarPinner(limit_nbytes)
    pinned = arena.pin(pinner, step_nbytes)
    step = max(1, step_nbytes // slot_nbytes)
    most = min(slots, limit_nbytes // slot_nbytes)
    assert pinned == arena.pinned_slots == (slots if most == slots else most // step * step)
    assert sum(pinner.pieces.values()) == pinned * slot_nbytes
    for slot in range(slots):
        seen = arena.device_address(slot)
        assert bool(seen) == (slot < pinned)
        if seen:
            piece = arena.address(slot // step * step)
            assert seen - pinner.device_address(piece) == arena.address(slot) - piece
    arena.close()
    assert not pinner.pieces
    assert arena.pinned_slots == 0


def test_a_kernel_would_read_a_pinned_slot_where_it_is() -> None:
    arena = HostArena(2 * PAGE, PAGE)
    assert arena.device_address(1) == 0
    assert arena.pin(SimulatedPinner()) == 2
    with arena.buffer(1) as buffer:
        buffer[:3] = b"abc"
    assert bytes_at(arena.device_address(1), 3) == b"abc"
    with pytest.raises(AssertionError, match="no slot 2"):
        arena.device_address(2)
    with pytest.raises(AssertionError, match="pinned already"):
        arena.pin(SimulatedPinner())
    arena.close()


class Driver:
    """As much of the CUDA driver as pinning calls; the device sees memory 2^40 further up."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes
        self.calls: list[tuple[str, int, int]] = []

    def cuMemHostRegister_v2(
        self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        assert flags.value == 3
        assert address.value is not None
        self.calls.append(("register", address.value, nbytes.value))
        return self.codes.pop(0)

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:
        assert address.value is not None
        self.calls.append(("unregister", address.value, 0))
        return self.codes.pop(0)

    def cuMemHostGetDevicePointer_v2(
        self, found: object, address: ctypes.c_void_p, flags: ctypes.c_uint
    ) -> int:
        assert flags.value == 0
        assert address.value is not None
        ctypes.cast(found, ctypes.POINTER(ctypes.c_uint64))[0] = address.value + (1 << 40)  # type: ignore[arg-type]
        return self.codes.pop(0)

    def cuGetErrorName(self, code: ctypes.c_int, name: object) -> int:
        if code.value == 2:
            ctypes.cast(name, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_OUT_OF_MEMORY"  # type: ignore[arg-type]
        return 0


def cuda_pinner(codes: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[CudaPinner, Driver]:
    driver = Driver(codes)
    monkeypatch.setattr(offload.pinning, "load_driver", lambda: driver)
    monkeypatch.setattr(CudaPinner, "_make_current", lambda self: None)
    return CudaPinner("cuda"), driver


def test_the_driver_is_asked_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    pinner, driver = cuda_pinner([0, 0, 2, 0], monkeypatch)
    arena = HostArena(5 * PAGE, PAGE)
    base = arena.address(0)
    assert arena.pin(pinner, 2 * PAGE) == 2
    assert pinner.refusal == "CUDA_ERROR_OUT_OF_MEMORY"
    assert [arena.device_address(i) for i in range(3)] == [
        base + (1 << 40),
        base + (1 << 40) + PAGE,
        0,
    ]
    arena.close()
    assert driver.calls == [
        ("register", base, 2 * PAGE),
        ("register", base + 2 * PAGE, 2 * PAGE),
        ("unregister", base, 0),
    ]


def test_what_is_pinned_but_unseen_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    pinner, _ = cuda_pinner([1], monkeypatch)
    with pytest.raises(AssertionError, match="out of the device's sight: error 1"):
        pinner.device_address(PAGE)


@pytest.mark.parametrize(("limit", "most", "found"), [(None, 3.5, 3), (2.5, 8, 2), (0, 8, 0)])
def test_how_much_can_be_pinned_is_tried_and_given_back(
    limit: float | None, most: float, found: int
) -> None:
    gib = 1 << 30
    pinner = SimulatedPinner(None if limit is None else int(limit * gib))
    assert pinnable_nbytes(pinner, int(most * gib)) == found * gib
    assert pinnable_nbytes(pinner, gib - 1) == 0
    assert pinner.pieces == {}
