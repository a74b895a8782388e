"""Knows how an expert gets to where it is needed, and holds it there; not what its bytes mean.

Disk below, main memory above it, and on top, when there is one, the device. A request pins its
experts in the top tier before anything is read, so what a lease covers is never moved. All
bookkeeping happens under one lock that is never held while bytes move.
"""

import mmap
import threading
from collections import deque
from collections.abc import Sequence

from offload.disk import DiskTier
from offload.errors import OffloadError
from offload.host import HostArena
from offload.keys import ExpertKey, describe
from offload.lease import Lease
from offload.policy import LruPolicy, PolicyFactory
from offload.slots import DeviceSlots
from offload.stats import CacheStats
from offload.table import Entry, SlotTable
from offload.trace import Trace, TraceEvent
from offload.workers import Workers

AHEAD_LIMIT = 64  # guesses that wait at most; the oldest go first
# Workers help with misses of at least this size: below it, waking one costs more than the read
# (80 KB experts in the page cache came at a third of the speed, and no faster from a cold disk).
HELP_NBYTES = 1 << 20


class ExpertManager:
    """Answers requests for experts from the tiers it is given, which it owns from then on.

    keep=False caches nothing: every request reads its experts anew, the slots only stage them, and
    `prefetch` does nothing. `num_workers` threads read ahead and help a request with several
    misses; with none, the caller reads all by itself and nothing is read ahead.

    Safe to use from several threads. Raises OffloadError where an expert cannot be read.
    """

    def __init__(
        self,
        disk: DiskTier,
        arena: HostArena,
        device: DeviceSlots | None = None,
        policy_factory: PolicyFactory = LruPolicy,
        num_workers: int = 2,
        keep: bool = True,
        trace: Trace | None = None,
    ) -> None:
        assert disk.max_nbytes <= arena.slot_nbytes, "an expert does not fit a slot"
        self.trace = trace
        self._disk, self._arena, self._device, self._keep = disk, arena, device, keep
        self._max_nbytes = disk.max_nbytes
        addresses = [arena.address(slot) for slot in range(arena.num_slots)]
        self._host = SlotTable(policy_factory(arena.num_slots), addresses, keep)
        self._top = self._host
        if device is not None:
            assert disk.max_nbytes <= device.slot_nbytes, "an expert does not fit a device slot"
            addresses = [device.address(slot) for slot in range(device.num_slots)]
            self._top = SlotTable(policy_factory(device.num_slots), addresses, keep)
        self._buffers = [arena.buffer(slot) for slot in range(arena.num_slots)]
        self._workers = Workers(num_workers, "moecli-experts")
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # a load ended, or a slot came free
        self._num_waiting = 0
        self._leases: set[Lease] = set()
        self._starved: set[int] = set()  # threads that wait for slots
        self._ahead: dict[ExpertKey, None] = {}  # guesses in the order they came
        self._num_reading_ahead = 0
        self._step = 0
        self._closed = False
        self._hits = self._misses = self._host_hits = self._host_misses = 0
        self._disk_nbytes = self._ahead_nbytes = self._device_nbytes = 0
        self._ahead_reads = self._ahead_dropped = self._ahead_failed = 0

    @property
    def keep(self) -> bool:
        """Whether experts stay after the request that brought them."""
        return self._keep

    @property
    def capacity(self) -> int:
        """How many experts one `ensure` can hold at once: the slots of the top tier."""
        return self._top.capacity

    @property
    def stats(self) -> CacheStats:
        host, top = self._host, self._top
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                host_hits=self._host_hits,
                host_misses=self._host_misses,
                evictions=top.evictions,
                host_evictions=0 if top is host else host.evictions,
                disk_nbytes=self._disk_nbytes,
                ahead_nbytes=self._ahead_nbytes,
                device_nbytes=self._device_nbytes,
                prefetch_reads=self._ahead_reads,
                prefetch_hits=host.ahead_used,
                prefetch_wasted=host.ahead_wasted,
                prefetch_dropped=self._ahead_dropped,
                prefetch_failed=self._ahead_failed,
            )

    def begin_step(self) -> None:
        """A new pass through the layers begins; only the trace cares."""
        self._step += 1

    def resident(self, layer: int) -> set[int]:
        """Experts of a layer that the top tier holds now, or is about to."""
        with self._lock:
            return {expert for of_layer, expert in self._top.entries if of_layer == layer}

    def waves(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """Divide these experts into groups that `ensure` can hold, residents first."""
        with self._lock:
            return self._top.waves(layer, experts)

    def ensure(self, layer: int, experts: Sequence[int]) -> Lease:
        """Wait until all these experts are in the top tier; they stay until the lease is released.

        At most `capacity` distinct ones. Raises OffloadError when one cannot be read; then none of
        them is held.
        """
        with self._lock:
            assert not self._closed, "the manager is closed"
            acquired = self._top.acquire(layer, experts)
            if acquired is None:
                acquired = self._wait_for_slots(layer, experts)
            addresses, entries, missing = acquired
            lease = Lease(layer, addresses, entries, self._release)
            self._leases.add(lease)
            self._hits += len(entries) - len(missing)
            self._misses += len(missing)
            if self.trace is not None:
                self._record(lease, missing)
            if self._ahead:
                self._forget_guesses(layer)
            if not missing and (not self._top.num_loading or all(e.ready for e in entries)):
                return lease
        try:
            self._load_all(missing)
            self._wait_for(entries)
        except BaseException:
            self._release(lease)
            raise
        return lease

    def _record(self, lease: Lease, missing: list[Entry]) -> None:
        assert self.trace is not None
        nbytes = 0
        for key in [entry.key for entry in missing]:
            in_memory = self._top is not self._host and key in self._host.entries
            if not in_memory and key in self._disk:  # if not, the read that follows says so
                nbytes += self._disk.nbytes_of(key)
        hits = len(lease.addresses) - len(missing)
        event = TraceEvent(self._step, lease.layer, tuple(lease.addresses), hits, nbytes)
        self.trace.append(event)

    # Waiting. All of it on one condition; `notify` is skipped while nobody waits.

    def _wait(self) -> None:
        self._num_waiting += 1
        try:
            self._changed.wait()
        finally:
            self._num_waiting -= 1

    def _notify(self) -> None:
        if self._num_waiting:
            self._changed.notify_all()

    def _wait_for_slots(
        self, layer: int, experts: Sequence[int]
    ) -> tuple[dict[int, int], list[Entry], list[Entry]]:
        """All at once or none, so that two half-served requests cannot block each other."""
        me = threading.get_ident()
        self._starved.add(me)
        try:
            while True:
                assert not self._closed, "the manager was closed during a request"
                acquired = self._top.acquire(layer, experts)
                if acquired is not None:
                    return acquired
                stuck = not self._top.num_loading and all(
                    lease.owner in self._starved for lease in self._leases
                )
                assert not stuck, "a request waits for slots that only its own thread's leases hold"
                self._wait()
        finally:
            self._starved.discard(me)

    def _wait_for(self, entries: list[Entry]) -> None:
        with self._lock:
            for entry in entries:
                while not entry.ready and entry.error is None:
                    self._wait()
            for entry in entries:
                if entry.error is not None:
                    _raise_error_of(entry)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            entries = lease.entries
            if entries:
                lease.entries = []
                self._top.unpin(entries)
            self._leases.discard(lease)
            self._notify()

    # Loading. `missing` is shared out: whoever is free takes the next, the caller included.

    def _load_all(self, missing: list[Entry]) -> None:
        queue = deque(missing)
        helpers = min(len(missing) - 1, self._workers.num_workers)
        if self._max_nbytes < HELP_NBYTES:
            helpers = 0
        try:
            for _ in range(helpers):
                self._workers.submit(lambda: self._load_from(queue))
            self._load_from(queue)
        except BaseException as error:
            while (entry := _pop(queue)) is not None:
                self._fail(self._top, entry, error)
            raise

    def _load_from(self, queue: deque[Entry]) -> None:
        while (entry := _pop(queue)) is not None:
            self._load(entry)

    def _load(self, entry: Entry) -> None:
        """Fill a reserved slot of the top tier; a failure is left in the entry."""
        try:
            if self._device is None:
                self._read(entry, ahead=False)
            else:
                self._copy_in(self._device, entry)
        except BaseException as error:
            self._fail(self._top, entry, error)
            if not isinstance(error, Exception):
                raise  # an interrupt is the caller's, not the expert's
        else:
            with self._lock:
                self._top.finish(entry)
                self._notify()

    def _fail(self, table: SlotTable, entry: Entry, error: BaseException) -> None:
        with self._lock:
            table.fail(entry, error)
            self._notify()

    def _read(self, entry: Entry, ahead: bool) -> None:
        """Disk to main memory; `entry` is one of the host's."""
        nbytes = self._disk.read_into(entry.key, self._buffers[entry.slot])
        with self._lock:
            self._disk_nbytes += nbytes
            if ahead:
                self._ahead_nbytes += nbytes
                self._ahead_reads += 1

    def _copy_in(self, device: DeviceSlots, entry: Entry) -> None:
        """Main memory to the device, by way of the disk if need be."""
        staged = self._stage(entry.key)
        try:
            nbytes = self._disk.nbytes_of(entry.key)
            with self._buffers[staged.slot][:nbytes] as source:
                device.copy_in(entry.slot, source)
            with self._lock:
                self._device_nbytes += nbytes
        finally:
            with self._lock:
                self._host.unpin((staged,))
                self._notify()

    def _stage(self, key: ExpertKey) -> Entry:
        """The expert in main memory, pinned there. No caller holds another host pin meanwhile."""
        host = self._host
        with self._lock:
            while True:
                entry = host.entries.get(key)
                if entry is not None:
                    return self._join(entry)
                if host.num_reclaimable:
                    break
                self._wait()
            entry = host.reserve(key)
            entry.pins += 1  # ours, besides the loader's
            self._host_misses += 1
        try:
            self._read(entry, ahead=False)
        except BaseException as error:
            self._fail(host, entry, error)
            raise
        with self._lock:
            host.finish(entry)
            self._notify()
        return entry

    def _join(self, entry: Entry) -> Entry:
        """Pin what main memory has or is about to have, and wait for it; under the lock."""
        self._host.pin(entry)
        self._host_hits += 1
        if entry.ahead:
            self._host.note_use(entry)
        try:
            while not entry.ready and entry.error is None:
                self._wait()
            if entry.error is not None:
                _raise_error_of(entry)
        except BaseException:
            self._host.unpin((entry,))
            raise
        return entry

    # Reading ahead, to main memory only, where it hides the disk; the device gets what is asked.

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Guess that `layer` will want these experts: returns at once, promises nothing.

        A guess is dropped when it finds no slot to take, when newer ones overtake it, or when its
        layer's `ensure` comes first. An error is not reported here: `ensure` will meet it.
        """
        if not self._keep or not self._workers.num_workers:
            return
        with self._lock:
            assert not self._closed, "the manager is closed"
            added = 0
            for expert in experts:
                key = (layer, expert)
                if key in self._ahead or key in self._top.entries or key in self._host.entries:
                    continue
                assert key in self._disk, f"{describe(key)} is in no file"
                self._ahead[key] = None
                added += 1
            while len(self._ahead) > AHEAD_LIMIT:
                del self._ahead[next(iter(self._ahead))]
                self._ahead_dropped += 1
            added = min(added, self._workers.num_workers)
        for _ in range(added):
            self._workers.submit(self._read_ahead, urgent=False)

    def _forget_guesses(self, layer: int) -> None:
        """What the layer wanted is known now."""
        for key in [key for key in self._ahead if key[0] == layer]:
            del self._ahead[key]
            self._ahead_dropped += 1

    def _read_ahead(self) -> None:
        """A worker's task: read guesses until none is left."""
        while True:
            with self._lock:
                entry = self._next_ahead()
                if entry is None:
                    self._notify()
                    return
                self._num_reading_ahead += 1
            try:
                self._read(entry, ahead=True)
            except BaseException as error:  # noqa: BLE001  # a waiting ensure finds it in the entry
                with self._lock:
                    self._host.fail(entry, error)
                    self._ahead_failed += 1
                    self._num_reading_ahead -= 1
                    self._notify()
            else:
                with self._lock:
                    self._host.finish(entry)
                    self._num_reading_ahead -= 1
                    self._notify()

    def _next_ahead(self) -> Entry | None:
        while self._ahead:
            key = next(iter(self._ahead))
            del self._ahead[key]
            here = key in self._top.entries or key in self._host.entries
            if not here and self._host.num_reclaimable and not self._starved:
                return self._host.reserve(key, ahead=True)
            self._ahead_dropped += 1
        return None

    def cancel_prefetch(self) -> int:
        """Drop the guesses that nobody has begun to read; returns how many."""
        with self._lock:
            count = len(self._ahead)
            self._ahead.clear()
            self._ahead_dropped += count
            self._notify()
            return count

    def drain_prefetch(self) -> None:
        """Wait until every guess is read or dropped."""
        with self._lock:
            while self._ahead or self._num_reading_ahead:
                self._wait()

    def check_integrity(self, deep: bool = False) -> None:
        """Assert that the bookkeeping is consistent; `deep`: that resident bytes equal the files'.

        Meant for tests and `doctor`: it holds everybody up while it runs.
        """
        with self._lock:
            self._host.check_integrity()
            self._top.check_integrity()
            held: dict[ExpertKey, int] = {}
            for lease in self._leases:
                for entry in lease.entries:
                    if entry.error is None:
                        held[entry.key] = held.get(entry.key, 0) + 1
                        assert lease.addresses[entry.key[1]] == entry.address, "a lease is astray"
            for key, entry in self._top.entries.items():
                pins = held.get(key, 0) + (not entry.ready)
                assert entry.pins == pins, f"{describe(key)}: {entry.pins} pins, not {pins}"
            if self._top is not self._host and not self._top.num_loading:
                loading = self._host.num_loading - self._num_reading_ahead
                assert not loading, f"{loading} reads into main memory that nobody does"
                pinned = [key for key, e in self._host.entries.items() if e.pins and e.ready]
                assert not pinned, f"{describe(pinned[0])} stays pinned in main memory"
            if deep:
                self._check_bytes()

    def _check_bytes(self) -> None:
        with mmap.mmap(-1, self._arena.slot_nbytes) as page, memoryview(page) as buffer:
            self._compare_with(buffer)

    def _compare_with(self, buffer: memoryview) -> None:
        for key, entry in [*self._host.entries.items(), *self._top.entries.items()]:
            if not entry.ready:
                continue
            nbytes = self._disk.read_into(key, buffer)
            if self._host.entries.get(key) is entry:
                same = self._buffers[entry.slot][:nbytes] == buffer[:nbytes]
            else:
                assert self._device is not None
                same = self._device.read_back(entry.slot, nbytes) == buffer[:nbytes]
            assert same, f"{describe(key)} differs from its file"

    def close(self) -> None:
        """End the workers and give back memory and files; no lease may be held any more."""
        with self._lock:
            if self._closed:
                return
            assert not self._leases, f"closed while {len(self._leases)} leases are held"
            self._closed = True
            self._ahead_dropped += len(self._ahead)
            self._ahead.clear()
            self._changed.notify_all()
        self._workers.close()
        for buffer in self._buffers:
            buffer.release()
        self._arena.close()
        self._disk.close()
        if self._device is not None:
            self._device.close()


def _pop(queue: deque[Entry]) -> Entry | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


def _raise_error_of(entry: Entry) -> None:
    error = entry.error
    assert error is not None, f"{describe(entry.key)} came"
    if isinstance(error, OffloadError):
        # A fresh one for each that waits: a shared one would collect everybody's tracebacks.
        raise OffloadError(error.message, error.hint) from error
    if isinstance(error, Exception):
        raise error  # a bug, told as it is
    raise OffloadError(f"reading {describe(entry.key)} was interrupted") from error
