"""Knows how an expert gets to where it is needed, and holds it there; not what its bytes mean.

Disk below, main memory above it, and on top, when there is one, the device. A request pins its
experts in the tier it wants them in before anything is read, so what a lease covers is never moved.
"""

import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby

from offload.ahead import ReadAhead
from offload.disk import DiskTier
from offload.host import HostArena
from offload.lease import Lease
from offload.policy import LruPolicy, PolicyFactory
from offload.slots import DeviceSlots
from offload.stats import CacheStats
from offload.stream import Sender, Stream
from offload.table import Entry, SlotTable
from offload.tiers import Tiers
from offload.trace import Trace, TraceEvent
from offload.workers import Workers

# Workers help with misses of at least this size: below it, waking one costs more than the read
# (80 KB experts in the page cache came at a third of the speed, and no faster from a cold disk).
HELP_NBYTES = 1 << 20
_LOAD_AT_ONCE = 16  # experts between two calls of a progress report


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
        self.trace = trace
        self._keep = keep
        self._disk, self._arena, self._device = disk, arena, device
        self._tiers = Tiers(disk, arena, device, policy_factory, keep)
        self._host, self._top = self._tiers.host, self._tiers.top
        self._waiting, self._counts = self._tiers.waiting, self._tiers.counts
        self._lock = self._waiting.lock
        self._workers = Workers(num_workers, "moecli-experts")
        self._ahead = ReadAhead(self._tiers, self._workers)
        self._helps = num_workers > 0 and disk.max_nbytes >= HELP_NBYTES
        self._step = 0
        self._closed = False
        self.unasked_hits = array("q", [0])  # int64 [1]: hits of those who did not ask; see `stays`

    @property
    def keep(self) -> bool:
        """Whether experts stay after the request that brought them."""
        return self._keep

    @property
    def stays(self) -> bool:
        """Whether an expert that came stays where it is for good, with a slot for every one.

        Whoever knows where it is need not ask for it again, and counts in `unasked_hits`. Nothing
        is ever evicted, so that nobody misses when it was used last. A trace wants to be asked.
        """
        enough = self._keep and self._top.capacity >= len(self._disk.keys)
        return enough and self._device is None and self.trace is None

    @property
    def capacity(self) -> int:
        """How many experts one `ensure` can hold at once: the slots of the top tier."""
        return self._top.capacity

    @property
    def stats(self) -> CacheStats:
        host, top = self._host, self._top
        two_tiers = top is not host
        with self._lock:
            counts = asdict(self._counts)
            counts["hits"] += self.unasked_hits[0]
            return CacheStats(
                **counts,
                evictions=top.evictions,
                host_evictions=host.evictions if two_tiers else 0,
                prefetch_hits=host.ahead_used,
                prefetch_wasted=host.ahead_wasted,
                copied_hits=top.ahead_used if two_tiers else 0,
                copied_wasted=top.ahead_wasted if two_tiers else 0,
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

    def host_address(self, layer: int, expert: int) -> int:
        """Where an expert's bytes lie in main memory; 0 where it is not there.

        Valid while a lease holds it, and for good where main memory has a slot for every expert.
        """
        entry = self._host.entries.get((layer, expert))
        return entry.address if entry is not None and entry.ready else 0

    def link_address(self, layer: int, expert: int) -> int:
        """Where the device reads an expert that lies in main memory; 0 where it cannot.

        It can where the expert is in a pinned slot. Valid as `host_address` is.
        """
        entry = self._host.entries.get((layer, expert))
        ready = entry is not None and entry.ready
        return self._arena.device_address(entry.slot) if entry is not None and ready else 0

    def ensure(self, layer: int, experts: Sequence[int]) -> Lease:
        """Wait until all these experts are in the top tier; they stay until the lease is released.

        At most `capacity` distinct ones. Raises OffloadError when one cannot be read; then none of
        them is held.
        """
        with self._lock:
            lease, missing = self._acquire(self._top, layer, experts)
            self._note(layer, list(lease.addresses), missing)
            if not missing and (not self._top.num_loading or all(e.ready for e in lease.entries)):
                return lease
        return self._fill(lease, missing)

    def stream(self, layer: int, experts: Sequence[int]) -> Stream:
        """Send for all these experts, however many; they come in leases of the top tier.

        So they can be worked on in the order in which they come: see Stream.
        """
        assert not self._closed, "the manager is closed"
        sender = Sender(self._note, self._share, self._load, self._drop, self._release)
        return Stream(layer, experts, self._top, self._tiers, sender)

    def lease_host(self, layer: int, experts: Sequence[int]) -> Lease:
        """Wait until all these experts are in main memory; they stay there, at `lease.addresses`.

        For whoever computes them there, or has the device read them over the link; no request of
        the top tier, where that is another. At most as many distinct ones as the arena has slots.
        """
        with self._lock:
            lease, missing = self._acquire(self._host, layer, experts)
            self._counts.leased_hits += len(lease.entries) - len(missing)
            self._counts.leased_misses += len(missing)
        return self._fill(lease, missing)

    def load_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every expert into main memory, which must have a slot for each.

        `progress` is told how many experts are there, and how many there are.
        """
        keys = sorted(self._disk.keys)
        assert self._keep, "what is not kept cannot be loaded"
        assert len(keys) <= self._arena.num_slots, "main memory does not hold all experts"
        done = 0
        for layer, of_layer in groupby(keys, key=lambda key: key[0]):
            experts = [expert for _, expert in of_layer]
            for first in range(0, len(experts), _LOAD_AT_ONCE):
                some = experts[first : first + _LOAD_AT_ONCE]
                self.lease_host(layer, some).release()
                done += len(some)
                if progress is not None:
                    progress(done, len(keys))

    def _acquire(
        self, table: SlotTable, layer: int, experts: Sequence[int]
    ) -> tuple[Lease, list[Entry]]:
        """Pin them in a tier; returns those that must be loaded as well. Under the lock."""
        assert not self._closed, "the manager is closed"
        acquired = table.acquire(layer, experts)
        if acquired is None:
            acquired = self._wait_for_slots(table, layer, experts)
        addresses, entries, missing = acquired
        lease = Lease(layer, table, addresses, entries, self._release)
        self._waiting.leases.add(lease)
        if missing:
            self._waiting.movers.add(threading.get_ident())
        return lease, missing

    def _wait_for_slots(
        self, table: SlotTable, layer: int, experts: Sequence[int]
    ) -> tuple[dict[int, int], list[Entry], list[Entry]]:
        """All at once or none, so that two half-served requests cannot block each other."""
        with self._waiting.for_slots():
            while True:
                self._waiting.wait()
                assert not self._closed, "the manager was closed during a request"
                acquired = table.acquire(layer, experts)
                if acquired is not None:
                    return acquired

    def _note(self, layer: int, experts: Sequence[int], missing: list[Entry]) -> None:
        """Count a request of the top tier, and settle what was guessed about it; under the lock."""
        self._counts.hits += len(experts) - len(missing)
        self._counts.misses += len(missing)
        if self.trace is not None:
            self._record(self.trace, layer, experts, missing)
        self._ahead.forget(layer)

    def _record(
        self, trace: Trace, layer: int, experts: Sequence[int], missing: list[Entry]
    ) -> None:
        nbytes = 0
        for key in [entry.key for entry in missing]:
            in_memory = self._top is not self._host and key in self._host.entries
            if not in_memory and key in self._disk:  # if not, the read that follows says so
                nbytes += self._disk.nbytes_of(key)
        hits = len(experts) - len(missing)
        trace.append(TraceEvent(self._step, layer, tuple(experts), hits, nbytes))

    def _release(self, lease: Lease) -> None:
        with self._lock:
            entries, lease.entries = lease.entries, []
            try:
                if entries and lease.table is not self._host:
                    assert self._device is not None
                    self._device.released([entry.slot for entry in entries if entry.ready])
            finally:
                lease.table.unpin(entries)
                self._waiting.leases.discard(lease)
                self._waiting.notify()

    # Loading. `missing` is shared out: whoever is free takes the next, the caller included.

    def _fill(self, lease: Lease, missing: list[Entry]) -> Lease:
        try:
            if missing:
                self._load_missing(lease.table, missing)
            with self._lock:
                self._tiers.wait_for(lease.entries)
        except BaseException:
            self._release(lease)
            raise
        return lease

    def _load_missing(self, table: SlotTable, missing: list[Entry]) -> None:
        queue = deque(missing)
        helpers = min(len(missing) - 1, self._workers.num_workers) if self._helps else 0
        try:
            for _ in range(helpers):
                self._workers.submit(lambda: self._help(table, queue))
            self._load_from(table, queue)
        except BaseException as error:
            while (entry := _pop(queue)) is not None:
                self._tiers.fail(table, entry, error)
            raise
        finally:
            with self._lock:
                self._waiting.end_move()

    # The same for a stream, whose caller has better to do than to read while something has come.

    def _share(self, unread: deque[Entry]) -> None:
        if self._helps:
            for _ in range(min(len(unread), self._workers.num_workers)):
                self._workers.submit(lambda: self._help(self._top, unread))

    def _load(self, unread: deque[Entry]) -> None:
        if not self._helps:
            self._load_from(self._top, unread)
        elif (entry := _pop(unread)) is not None:
            self._tiers.load(self._top, entry)

    def _drop(self, unread: deque[Entry]) -> None:
        while (entry := _pop(unread)) is not None:
            self._tiers.fail(self._top, entry, GeneratorExit())

    def _help(self, table: SlotTable, queue: deque[Entry]) -> None:
        """A worker's task."""
        with self._lock:
            self._waiting.movers.add(threading.get_ident())
        try:
            self._load_from(table, queue)
        finally:
            with self._lock:
                self._waiting.end_move()

    def _load_from(self, table: SlotTable, queue: deque[Entry]) -> None:
        while (entry := _pop(queue)) is not None:
            self._tiers.load(table, entry)

    # Reading ahead.

    def prefetch(self, layer: int, experts: Sequence[int], to_device: bool = False) -> None:
        """Guess that `layer` will want these experts: returns at once, promises nothing.

        They are fetched into main memory, which hides the disk, and with `to_device` into slots of
        the device as well, which hides the copy; guesses hold at most half of those. A guess is
        dropped when it finds no slot to take, when newer ones overtake it, or when its layer's
        `ensure` comes first. An error is not reported here: `ensure` will meet it.
        """
        if not self._keep or not self._workers.num_workers:
            return
        assert not self._closed, "the manager is closed"
        self._ahead.add(layer, experts, to_device)

    def cancel_prefetch(self) -> int:
        """Drop the guesses that nobody has begun to read; returns how many."""
        with self._lock:
            return self._ahead.clear()

    def drain_prefetch(self) -> None:
        """Wait until every guess is read or dropped."""
        with self._lock:
            self._waiting.wait_until(self._ahead.is_idle)

    def check_integrity(self, deep: bool = False) -> None:
        """Assert that the bookkeeping is consistent; `deep`: that resident bytes equal the files'.

        Meant for tests and `doctor`: it holds everybody up while it runs.
        """
        with self._lock:
            self._tiers.check_integrity()
            if deep:
                self._tiers.check_bytes()

    def close(self) -> None:
        """End the workers and give back memory and files; no lease may be held any more."""
        with self._lock:
            if self._closed:
                return
            leases = len(self._waiting.leases)
            assert not leases, f"closed while {leases} leases are held"
            self._closed = True
            self._ahead.clear()
        self._workers.close()
        self._tiers.close()


def _pop(queue: deque[Entry]) -> Entry | None:
    try:
        return queue.popleft()
    except IndexError:
        return None
