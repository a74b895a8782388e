"""Random routings, budgets, leases, guesses and failures; nothing may ever be out of place."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import offload.manager
from offload.errors import OffloadError
from offload.keys import ExpertKey
from offload.lease import Lease
from offload.manager import ExpertManager
from offload.pieces import Piece
from offload.pinning import SimulatedPinner
from offload.slots import SlotPool
from offload.table import SlotTable
from tests.offload.late_device import LateTransfer
from tests.offload.offload_files import FlakyDisk, ModelFiles, bytes_at

EXPERTS = st.lists(st.integers(0, 5), min_size=1, max_size=8)
LAYER = st.integers(0, 2)
# What of an expert is copied to the device, where that has the rest already.
PIECES = ((Piece(2000, 3000),), (Piece(100, 40), Piece(500, 90, 5, 800), Piece(4999, 1)))


class CacheMachine(RuleBasedStateMachine):
    """One thread that asks; kernels of the device read what it held after it let go."""

    files: ModelFiles  # set by the test below
    drop_cache: bool

    def __init__(self) -> None:
        super().__init__()
        self.manager: ExpertManager | None = None
        self.leases: list[Lease] = []
        self.requests = 0
        self.failures = 0
        self.num_checked = 0  # reads of deep checks

    @initialize(
        host_slots=st.integers(1, 9),
        device_slots=st.one_of(st.none(), st.integers(1, 6)),
        num_workers=st.sampled_from([0, 1, 2]),
        keep=st.sampled_from([True, True, True, False]),
        pinned_slots=st.integers(0, 9),
        fragile=st.booleans(),
        pieces=st.sampled_from([None, *PIECES]),
    )
    def start(
        self,
        host_slots: int,
        device_slots: int | None,
        num_workers: int,
        keep: bool,
        pinned_slots: int,
        fragile: bool,
        pieces: tuple[Piece, ...] | None,
    ) -> None:
        self.fragile = fragile
        self.copied = pieces or (Piece(0, self.files.nbytes),)
        slot_nbytes = self.files.slot_nbytes
        self.late = LateTransfer()
        self.disk = FlakyDisk(self.files.spans, self.drop_cache)
        device = None
        if device_slots:
            device = SlotPool(device_slots, slot_nbytes, "cpu", self.late, pieces)
        self.manager = self.files.manager(
            host_slots,
            device=device,
            num_workers=num_workers,
            keep=keep,
            disk=self.disk,
        )
        pinner = SimulatedPinner(pinned_slots * slot_nbytes)
        pinned = self.manager._arena.pin(pinner, step_nbytes=slot_nbytes)
        assert pinned == min(pinned_slots, host_slots)

    @property
    def on_device(self) -> bool:
        assert self.manager is not None
        return self.manager._device is not None

    def held(self, table: SlotTable) -> Counter[ExpertKey]:
        return Counter(
            (lease.layer, e)
            for lease in self.leases
            if lease.table is table
            for e in lease.addresses
        )

    def take(self, layer: int, experts: list[int], host: bool) -> Lease | None:
        """As many as this one thread can get beside its leases; None after a failure."""
        manager = self.manager
        assert manager is not None
        table = manager._host if host else manager._top
        held = self.held(table)
        room = table.capacity - len(held)
        if host and self.on_device:
            room -= 1  # what goes to the device passes through main memory
        wanted: list[int] = []
        for expert in dict.fromkeys(experts):
            room -= (layer, expert) not in held
            if room < 0:
                break
            wanted.append(expert)
        asked = wanted + wanted[:1]
        if not host:
            self.requests += len(wanted)
        try:
            lease = manager.lease_host(layer, asked) if host else manager.ensure(layer, asked)
        except OffloadError:
            assert self.failures, "nothing was broken"
            return None
        assert list(lease.addresses) == wanted
        self.leases.append(lease)
        return lease

    def let_go(self, lease: Lease) -> None:
        assert self.manager is not None
        self.check_bytes()
        if self.on_device and lease.table is self.manager._top:
            for address, expected in self.expected(lease):
                self.late.launch(address, expected)
        self.leases.remove(lease)
        lease.release()

    @rule(layer=LAYER, experts=EXPERTS, hold=st.booleans())
    def ensure(self, layer: int, experts: list[int], hold: bool) -> None:
        assert self.manager is not None
        lease = self.take(layer, experts, host=False)
        if lease is not None:
            assert set(lease.addresses) <= self.manager.resident(layer)
            if not hold:
                self.let_go(lease)

    @rule(layer=LAYER, experts=EXPERTS, hold=st.booleans())
    def lease_host(self, layer: int, experts: list[int], hold: bool) -> None:
        assert self.manager is not None
        lease = self.take(layer, experts, host=True)
        if lease is not None:
            for expert, address in lease.addresses.items():
                assert self.manager.host_address(layer, expert) == address
                slot = (address - self.manager._arena.address(0)) // self.files.slot_nbytes
                pinned = slot < self.manager._arena.pinned_slots
                assert self.manager.link_address(layer, expert) == (address if pinned else 0)
            if not hold:
                self.let_go(lease)

    @precondition(lambda self: not self.leases)
    @rule(layer=LAYER, experts=EXPERTS)
    def waves(self, layer: int, experts: list[int]) -> None:
        assert self.manager is not None
        waves = self.manager.waves(layer, experts)
        assert sorted(e for wave in waves for e in wave) == sorted(set(experts))
        assert all(1 <= len(wave) <= self.manager.capacity for wave in waves)
        for wave in waves:
            lease = self.take(layer, wave, host=False)
            if lease is not None:
                assert list(lease.addresses) == wave
                self.let_go(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases[data.draw(st.integers(0, len(self.leases) - 1))]
        self.let_go(lease)
        lease.release()

    @rule(layer=LAYER, experts=EXPERTS, to_device=st.booleans())
    def prefetch(self, layer: int, experts: list[int], to_device: bool) -> None:
        assert self.manager is not None
        self.manager.prefetch(layer, experts, to_device)

    @rule()
    def drain(self) -> None:
        assert self.manager is not None
        self.manager.drain_prefetch()
        broken, self.disk.fail_next = self.disk.fail_next, False
        before = self.disk.num_read
        self.manager.check_integrity(deep=True)
        self.num_checked += self.disk.num_read - before
        self.disk.fail_next = broken

    @rule()
    def cancel(self) -> None:
        assert self.manager is not None
        self.manager.cancel_prefetch()

    @precondition(lambda self: self.manager is not None and self.fragile)
    @rule()
    def break_a_read(self) -> None:
        self.failures += 1
        self.disk.fail_next = True

    @precondition(lambda self: self.manager is not None and self.fragile and self.on_device)
    @rule()
    def break_a_copy(self) -> None:
        self.failures += 1
        self.late.fail_next = True

    @rule()
    def let_kernels_run(self) -> None:
        self.late.run()

    def expected(self, lease: Lease) -> Iterator[tuple[int, bytes]]:
        """What lies at which address: all of an expert, or what is copied to the device."""
        assert self.manager is not None
        up = self.on_device and lease.table is self.manager._top
        pieces = self.copied if up else (Piece(0, self.files.nbytes),)
        for expert, address in lease.addresses.items():
            blob = self.files.blobs[lease.layer, expert]
            for piece in pieces:
                for start in range(piece.offset, piece.end, piece.pitch or piece.nbytes):
                    yield address + start, blob[start : start + piece.nbytes]

    def check_bytes(self) -> None:
        for lease in self.leases:
            for address, expected in self.expected(lease):
                assert bytes_at(address, len(expected)) == expected

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if self.manager is None:
            return
        manager = self.manager
        manager.check_integrity()
        self.check_bytes()
        assert not self.late.overwritten
        addresses: dict[int, ExpertKey] = {}
        for lease in self.leases:
            for expert, address in lease.addresses.items():
                assert addresses.setdefault(address, (lease.layer, expert)) == (lease.layer, expert)
        assert manager.stats.requests == self.requests
        if self.on_device:
            with manager._lock:
                guesses = sum(entry.ahead for entry in manager._top.entries.values())
            assert guesses <= manager.capacity // 2

    def teardown(self) -> None:
        if self.manager is None:
            return
        self.disk.fail_next = self.late.fail_next = False
        for lease in list(self.leases):
            self.let_go(lease)
        self.manager.drain_prefetch()
        self.check_counts()
        self.manager.check_integrity(deep=True)
        self.late.run()
        self.manager.close()

    def check_counts(self) -> None:
        assert self.manager is not None
        stats, nbytes = self.manager.stats, self.files.nbytes
        read = self.disk.num_read - self.num_checked  # a deep check reads as well
        failed = stats.prefetch_failed  # may have been asked for on their way
        assert stats.prefetch_hits + stats.prefetch_wasted <= stats.prefetch_reads + failed
        assert stats.copied_hits + stats.copied_wasted <= stats.copied_ahead + failed
        assert stats.disk_nbytes == read * nbytes
        if self.failures:
            return
        assert not failed
        reads = stats.host_misses if self.on_device else stats.misses
        assert read == reads + stats.prefetch_reads + stats.leased_misses
        copies = stats.misses + stats.copied_ahead if self.on_device else 0
        assert stats.device_nbytes == copies * sum(piece.total_nbytes for piece in self.copied)
        assert stats.host_hits + stats.host_misses == (stats.misses if self.on_device else 0)


@pytest.mark.parametrize(
    ("help_nbytes", "drop_cache", "num_examples"),
    [(0, False, 150), (1 << 20, False, 150), (0, True, 10)],  # direct reads take their time
)
def test_random_use(
    files: ModelFiles,
    monkeypatch: pytest.MonkeyPatch,
    help_nbytes: int,
    drop_cache: bool,
    num_examples: int,
) -> None:
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", help_nbytes)
    CacheMachine.files, CacheMachine.drop_cache = files, drop_cache
    steps = settings(max_examples=num_examples, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(CacheMachine, settings=steps)
