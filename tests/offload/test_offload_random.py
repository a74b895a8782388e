"""Random routings, budgets, leases and guesses; after every step nothing may be out of place."""

from collections import Counter

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
from offload.keys import ExpertKey
from offload.lease import Lease
from offload.manager import ExpertManager
from offload.slots import SlotPool
from tests.offload.offload_files import ModelFiles, bytes_at

EXPERTS = st.lists(st.integers(0, 5), min_size=1, max_size=8)
LAYER = st.integers(0, 2)


class CacheMachine(RuleBasedStateMachine):
    files: ModelFiles  # set by the test below
    drop_cache: bool

    def __init__(self) -> None:
        super().__init__()
        self.manager: ExpertManager | None = None
        self.leases: list[Lease] = []
        self.requests = 0

    @initialize(
        host_slots=st.integers(1, 9),
        device_slots=st.one_of(st.none(), st.integers(1, 6)),
        num_workers=st.sampled_from([0, 1, 2]),
        keep=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        host_slots: int,
        device_slots: int | None,
        num_workers: int,
        keep: bool,
    ) -> None:
        device = SlotPool(device_slots, self.files.slot_nbytes, "cpu") if device_slots else None
        self.manager = self.files.manager(
            host_slots,
            device=device,
            num_workers=num_workers,
            keep=keep,
            disk=self.files.disk(self.drop_cache),
        )

    def held(self) -> Counter[ExpertKey]:
        return Counter((lease.layer, e) for lease in self.leases for e in lease.addresses)

    @rule(layer=LAYER, experts=EXPERTS, hold=st.booleans())
    def ensure(self, layer: int, experts: list[int], hold: bool) -> None:
        assert self.manager is not None
        held = self.held()
        room = self.manager.capacity - len(held)
        wanted: list[int] = []
        for expert in dict.fromkeys(
            experts
        ):  # as many as this one thread can get beside its leases
            room -= (layer, expert) not in held
            if room < 0:
                break
            wanted.append(expert)
        lease = self.manager.ensure(layer, wanted + wanted[:1])
        assert list(lease.addresses) == wanted
        assert set(wanted) <= self.manager.resident(layer)
        self.requests += len(wanted)
        self.leases.append(lease)
        if not hold:
            self.check_bytes()
            self.leases.pop().release()

    @rule(layer=LAYER, experts=EXPERTS)
    def waves(self, layer: int, experts: list[int]) -> None:
        assert self.manager is not None
        waves = self.manager.waves(layer, experts)
        assert sorted(e for wave in waves for e in wave) == sorted(set(experts))
        assert all(1 <= len(wave) <= self.manager.capacity for wave in waves)
        if self.leases:
            return
        for wave in waves:
            with self.manager.ensure(layer, wave) as lease:
                for expert, address in lease.addresses.items():
                    blob = self.files.blobs[layer, expert]
                    assert bytes_at(address, len(blob)) == blob
            self.requests += len(wave)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        lease.release()

    @rule(layer=LAYER, experts=EXPERTS)
    def prefetch(self, layer: int, experts: list[int]) -> None:
        assert self.manager is not None
        self.manager.prefetch(layer, experts)

    @rule()
    def drain(self) -> None:
        assert self.manager is not None
        self.manager.drain_prefetch()
        self.manager.check_integrity(deep=True)

    @rule()
    def cancel(self) -> None:
        assert self.manager is not None
        self.manager.cancel_prefetch()

    def check_bytes(self) -> None:
        for lease in self.leases:
            for expert, address in lease.addresses.items():
                blob = self.files.blobs[lease.layer, expert]
                assert bytes_at(address, len(blob)) == blob

    @invariant()
    def nothing_is_out_of_place(self) -> None:
        if self.manager is None:
            return
        self.manager.check_integrity()
        self.check_bytes()
        addresses: dict[int, ExpertKey] = {}
        for lease in self.leases:
            for expert, address in lease.addresses.items():
                assert addresses.setdefault(address, (lease.layer, expert)) == (lease.layer, expert)
        assert self.manager.stats.requests == self.requests

    def teardown(self) -> None:
        if self.manager is None:
            return
        for lease in self.leases:
            lease.release()
        self.manager.drain_prefetch()
        self.manager.check_integrity(deep=True)
        stats, nbytes = self.manager.stats, self.files.nbytes
        on_device = self.manager._device is not None
        reads = stats.host_misses if on_device else stats.misses
        assert stats.disk_nbytes == (reads + stats.prefetch_reads) * nbytes
        assert stats.device_nbytes == (stats.misses * nbytes if on_device else 0)
        assert stats.host_hits + stats.host_misses == (stats.misses if on_device else 0)
        assert stats.prefetch_hits + stats.prefetch_wasted <= stats.prefetch_reads
        self.manager.close()


@pytest.mark.parametrize(
    ("help_nbytes", "drop_cache", "num_examples"),
    [(0, False, 100), (1 << 20, False, 100), (0, True, 10)],  # direct reads take their time
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
