"""Knows the tiers of one manager, and how the bytes of an expert get from one to the next.

All bookkeeping happens under the lock of `waiting`, which is never held while bytes move.
"""

import mmap
from collections.abc import Sequence

from offload.disk import DiskTier
from offload.errors import OffloadError
from offload.host import HostArena
from offload.keys import ExpertKey, describe
from offload.policy import PolicyFactory
from offload.slots import DeviceSlots
from offload.stats import Counts
from offload.table import Entry, SlotTable
from offload.waiting import Waiting


class Tiers:
    """Disk, main memory, and a device or none; the uppermost of the latter two is `top`."""

    def __init__(
        self,
        disk: DiskTier,
        arena: HostArena,
        device: DeviceSlots | None,
        policy_factory: PolicyFactory,
        keep: bool,
    ) -> None:
        assert disk.max_nbytes <= arena.slot_nbytes, "an expert does not fit a slot"
        self.disk, self.arena, self.device = disk, arena, device
        self.waiting = Waiting()
        self.counts = Counts()
        addresses = [arena.address(slot) for slot in range(arena.num_slots)]
        self.host = SlotTable(policy_factory(arena.num_slots), addresses, keep)
        self.top = self.host
        if device is not None:
            assert disk.max_nbytes <= device.slot_nbytes, "an expert does not fit a device slot"
            addresses = [device.address(slot) for slot in range(device.num_slots)]
            self.top = SlotTable(policy_factory(device.num_slots), addresses, keep)
        self.buffers = [arena.buffer(slot) for slot in range(arena.num_slots)]

    def load(self, table: SlotTable, entry: Entry) -> None:
        """Fill a reserved slot of a tier; a failure is left in the entry."""
        try:
            if table is self.host:
                self.read(entry)
            else:
                self._copy_in(entry)
        except BaseException as error:
            self.fail(table, entry, error)
            if not isinstance(error, Exception):
                raise  # an interrupt is the caller's, not the expert's
        else:
            with self.waiting.lock:
                table.finish(entry)
                self.waiting.notify()

    def fail(self, table: SlotTable, entry: Entry, error: BaseException) -> None:
        with self.waiting.lock:
            table.fail(entry, error)
            self.waiting.notify()

    def read(self, entry: Entry) -> int:
        """Disk to main memory; `entry` is one of the host's."""
        nbytes = self.disk.read_into(entry.key, self.buffers[entry.slot])
        with self.waiting.lock:
            self.counts.disk_nbytes += nbytes
        return nbytes

    def copy_up(self, entry: Entry, staged: Entry) -> None:
        """Main memory, where `staged` is ready and pinned, to a slot of the device."""
        assert self.device is not None
        assert entry.key == staged.key, f"{describe(staged.key)} in place of {describe(entry.key)}"
        nbytes = self.disk.nbytes_of(entry.key)
        with self.buffers[staged.slot][:nbytes] as source:
            moved = self.device.copy_in(entry.slot, source)
        with self.waiting.lock:
            self.counts.device_nbytes += moved

    def _copy_in(self, entry: Entry) -> None:
        """To the device, by way of main memory, and of the disk if need be."""
        staged = self._stage(entry.key)
        try:
            self.copy_up(entry, staged)
        finally:
            with self.waiting.lock:
                self.host.unpin((staged,))
                self.waiting.notify()

    def _stage(self, key: ExpertKey) -> Entry:
        """The expert in main memory, pinned there for a copy. No thread stages two at once."""
        host, waiting = self.host, self.waiting
        with waiting.lock:
            with waiting.for_slots():
                while (entry := host.entries.get(key)) is None and not host.num_reclaimable:
                    waiting.wait()
            if entry is not None:
                self.counts.host_hits += 1
                return self.join(entry)
            entry = host.reserve(key)
            host.pin(entry)  # ours, besides the loader's
            self.counts.host_misses += 1
        try:
            self.read(entry)
        except BaseException as error:
            self.fail(host, entry, error)
            raise
        with waiting.lock:
            host.finish(entry)
            waiting.notify()
        return entry

    def join(self, entry: Entry) -> Entry:
        """Pin what main memory has or is about to have, and wait for it; under the lock."""
        self.host.pin(entry)
        if entry.ahead:
            self.host.note_use(entry)
        try:
            self.wait_for((entry,))
        except BaseException:
            self.host.unpin((entry,))
            raise
        return entry

    def wait_for(self, entries: Sequence[Entry]) -> None:
        """Until all have come or failed; raises the first failure. Under the lock."""
        for entry in entries:
            while not entry.ready and entry.error is None:
                self.waiting.wait()
        for entry in entries:
            if entry.error is not None:
                _raise_error_of(entry)

    def check_integrity(self) -> None:
        """Assert that tables, pins and leases agree; under the lock."""
        held: dict[int, int] = {}  # by entry
        for lease in self.waiting.leases:
            for entry in lease.entries:
                if entry.error is None:
                    held[id(entry)] = held.get(id(entry), 0) + 1
                    assert lease.addresses[entry.key[1]] == entry.address, "a lease is astray"
                    assert lease.table.entries.get(entry.key) is entry, "a lease is astray"
        self.host.check_integrity()
        _check_pins(self.host, held, exact=self.top is self.host or not self.waiting.movers)
        if self.top is not self.host:
            self.top.check_integrity()
            _check_pins(self.top, held, exact=True)
        if not self.waiting.movers:
            loading = self.host.num_loading + self.top.num_loading
            assert not loading, f"{loading} experts are on a way that nobody goes"

    def check_bytes(self) -> None:
        """Assert that every resident expert equals its file; under the lock."""
        with mmap.mmap(-1, self.arena.slot_nbytes) as page, memoryview(page) as buffer:
            for key, entry in [*self.host.entries.items(), *self.top.entries.items()]:
                if entry.ready:
                    nbytes = self.disk.read_into(key, buffer)
                    assert self._holds(entry, buffer[:nbytes]), (
                        f"{describe(key)} differs from its file"
                    )

    def _holds(self, entry: Entry, expected: memoryview) -> bool:
        with expected:
            if self.host.entries.get(entry.key) is entry:
                return self.buffers[entry.slot][: expected.nbytes] == expected
            assert self.device is not None
            return self.device.holds(entry.slot, expected)

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.release()
        # The device first: a copy that is still under way reads the arena.
        if self.device is not None:
            self.device.close()
        self.arena.close()
        self.disk.close()


def _check_pins(table: SlotTable, held: dict[int, int], exact: bool) -> None:
    """Leases and loaders pin, and, unless `exact`, copies on their way up."""
    for key, entry in table.entries.items():
        pins = held.get(id(entry), 0) + (not entry.ready)
        right = entry.pins == pins if exact else entry.pins >= pins
        assert right, f"{describe(key)}: {entry.pins} pins, not {pins}"


def _raise_error_of(entry: Entry) -> None:
    error = entry.error
    assert error is not None, f"{describe(entry.key)} came"
    if isinstance(error, OffloadError):
        # A fresh one for each that waits: a shared one would collect everybody's tracebacks.
        raise OffloadError(error.message, error.hint) from error
    if isinstance(error, Exception):
        raise error  # a bug, told as it is
    raise OffloadError(f"reading {describe(entry.key)} was interrupted") from error
