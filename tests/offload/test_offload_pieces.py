"""What of an expert is copied where a part of it is on the device already."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import pieces
from offload.host import HostArena
from offload.pieces import Piece, copy_pieces, worth_copying
from offload.pinning import CudaPinner
from offload.slots import SlotPool
from tests.offload.offload_files import ModelFiles, bytes_at

KIB = 1 << 10


def test_runs_with_little_between_them_come_as_one() -> None:
    apart, near = Piece(0, 256, 10, 384), Piece(0, 257, 10, 384)
    assert worth_copying([apart]) == (apart,)
    assert worth_copying([near]) == (Piece(0, 9 * 384 + 257),)
    assert (apart.end, apart.total_nbytes) == (9 * 384 + 256, 2560)


def test_pieces_with_little_between_them_come_as_one() -> None:
    near = [Piece(0, 100), Piece(100 + 64 * KIB - 1, 50)]
    assert worth_copying(near) == (Piece(0, 64 * KIB + 149),)
    far = [Piece(0, 100), Piece(100 + 64 * KIB, 50)]
    assert worth_copying(far) == tuple(far)
    runs = [Piece(0, 100), Piece(100, 300, 5, 430), Piece(2200, 100)]
    assert worth_copying(runs) == tuple(runs), "runs keep to themselves"


@st.composite
def pieces_in_order(draw: st.DrawFn) -> list[Piece]:
    found, at = [], 0
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.integers(0, 12))
        nbytes, runs = draw(st.integers(1, 9)), draw(st.integers(1, 4))
        piece = Piece(at, nbytes, runs, nbytes + draw(st.integers(0, 9)))
        at = piece.end
        found.append(piece)
    return found


@given(pieces_in_order(), st.integers(0, 9), st.integers(0, 9))
def test_what_is_wanted_is_copied_once_and_little_else(
    wanted: list[Piece], run: int, gap: int
) -> None:
    source = torch.arange(1, 250, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "RUN_GAP_NBYTES", run)
        patch.setattr(pieces, "GAP_NBYTES", gap)
        found = worth_copying(wanted)
    target = torch.zeros_like(source)
    copy_pieces(target, source, found)
    for piece in wanted:
        assert torch.equal(piece.of(target), piece.of(source))
    copied = sum(piece.total_nbytes for piece in found)
    assert copied == int(target.count_nonzero()), "nothing is copied twice"
    if not run and not gap:
        assert copied == sum(piece.total_nbytes for piece in wanted)


def test_a_pool_copies_and_checks_its_pieces_alone(files: ModelFiles) -> None:
    wanted = (Piece(100, 50), Piece(1000, 30, 4, 500))
    pool = SlotPool(2, files.slot_nbytes, "cpu", pieces=wanted)
    pool._block.zero_()
    source = bytearray(files.blobs[0, 0])
    assert pool.copy_in(1, memoryview(source)) == 50 + 120
    found = torch.frombuffer(bytearray(bytes_at(pool.address(1), 5000)), dtype=torch.uint8)
    expected = torch.zeros_like(found)
    copy_pieces(expected, torch.frombuffer(source, dtype=torch.uint8), wanted)
    assert torch.equal(found, expected)
    source[99] ^= 1
    assert pool.holds(1, memoryview(source))
    source[2529] ^= 1
    assert not pool.holds(1, memoryview(source)), "the last byte of the last run"
    pool.close()


def test_the_manager_counts_what_is_copied(files: ModelFiles) -> None:
    wanted = (Piece(4000, 1000),)
    pool = SlotPool(3, files.slot_nbytes, "cpu", pieces=wanted)
    manager = files.manager(4, device=pool)
    with manager.ensure(0, [0, 1]) as lease:
        for expert, address in lease.addresses.items():
            assert bytes_at(address + 4000, 1000) == files.blobs[0, expert][4000:]
    manager.prefetch(1, [0], to_device=True)
    manager.drain_prefetch()
    assert manager.stats.device_nbytes == 3 * 1000
    manager.check_integrity(deep=True)
    manager.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pinned", [True, False])
def test_a_card_copies_runs_that_lie_apart(pinned: bool) -> None:
    nbytes = 1 << 20
    wanted = (Piece(5, 1000), Piece(4096, 300, 200, 4096))
    arena = HostArena(nbytes, nbytes)
    if pinned:
        arena.pin(CudaPinner("cuda"))
    pool = SlotPool(2, nbytes, "cuda", pieces=wanted)
    pool._block.zero_()
    with arena.buffer(0) as buffer:
        source = torch.frombuffer(buffer, dtype=torch.uint8)
        source.copy_(torch.randint(1, 256, (nbytes,), dtype=torch.uint8))
        assert pool.copy_in(1, buffer) == 1000 + 60_000
        assert pool.holds(1, buffer)
        del source
    assert int(pool._block.count_nonzero()) == 61_000
    pool.close()
    arena.close()
