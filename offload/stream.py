"""Knows the experts of one layer that were sent for, and hands them out as they come.

How they come is the manager's business; a stream says for which of them there are slots.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from offload.lease import Lease
from offload.table import Entry, SlotTable
from offload.tiers import Tiers


class Sender(NamedTuple):
    """What a stream asks of the manager; all but `note` without the lock."""

    note: Callable[[int, Sequence[int], list[Entry]], None]  # (layer, experts, those to be loaded)
    share: Callable[[deque[Entry]], None]  # have workers load the entries of a queue
    load: Callable[[deque[Entry]], None]  # load some of them here
    drop: Callable[[deque[Entry]], None]  # they will not be loaded
    release: Callable[[Lease], None]


class Stream:
    """Leases that together cover the experts asked for, each in one of them: residents first.

    As many as there are slots for are on their way from the start, the others follow as leases are
    released: while one lease is worked on, the next ones come, for it never takes more than half of
    all slots. Release each before asking for the
    next, and `close` a stream that is not iterated to its end; it holds its experts until then.
    It belongs to the thread that made it. Raises OffloadError where an expert cannot be read.
    """

    def __init__(
        self, layer: int, experts: Sequence[int], table: SlotTable, tiers: Tiers, sender: Sender
    ) -> None:
        self._table, self._tiers, self._sender = table, tiers, sender
        self._held = Lease(layer, table, {}, [], sender.release)  # sent for, not handed out
        self._unread: deque[Entry] = deque()  # of these, nobody's yet; shared with the workers
        with tiers.waiting.lock:
            self._wanted = deque(table.residents_first(layer, experts))  # not sent for
            sent = self._send()
        if sent:
            sender.share(self._unread)

    @property
    def room(self) -> int:
        """How many slots are left for others: none before every expert here has one."""
        with self._tiers.waiting.lock:
            return 0 if self._wanted else self._table.num_reclaimable

    def __iter__(self) -> Iterator[Lease]:
        return self

    def __next__(self) -> Lease:
        """Those that have come meanwhile; at least one."""
        try:
            while True:
                with self._tiers.waiting.lock:
                    sent = self._send()
                    lease = self._hand_out()
                    if lease is None and not self._unread:
                        self._wait()
                        continue
                if sent:
                    self._sender.share(self._unread)
                if lease is not None:
                    return lease
                self._sender.load(self._unread)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of what was not handed out; a second call does nothing."""
        self._wanted.clear()
        self._sender.drop(self._unread)
        self._sender.release(self._held)
        with self._tiers.waiting.lock:
            self._tiers.waiting.end_move()

    # Under the lock.

    def _send(self) -> bool:
        """Reserve the slots that there are; whether something is to be loaded for that."""
        if not self._wanted:
            return False
        layer, waiting = self._held.layer, self._tiers.waiting
        count = self._table.fitting(layer, self._wanted)
        if not count:
            return False
        acquired = self._table.acquire(layer, [self._wanted.popleft() for _ in range(count)])
        assert acquired is not None, "slots that were there are gone"
        addresses, entries, missing = acquired
        self._sender.note(layer, list(addresses), missing)
        self._held.addresses.update(addresses)
        self._held.entries += entries
        waiting.leases.add(self._held)
        if missing:
            self._unread.extend(missing)
            waiting.movers.add(threading.get_ident())  # until somebody else has all of them
        return bool(missing)

    def _hand_out(self) -> Lease | None:
        held, waiting = self._held, self._tiers.waiting
        failed = [entry for entry in held.entries if entry.error is not None]
        if failed:
            self._tiers.wait_for(failed)  # raises
        most = max(1, self._table.capacity // 2)
        ready = [entry for entry in held.entries if entry.ready][:most]
        if not ready:
            return None
        addresses = {entry.key[1]: held.addresses.pop(entry.key[1]) for entry in ready}
        lease = Lease(held.layer, self._table, addresses, ready, self._sender.release)
        held.entries = [entry for entry in held.entries if entry.key[1] in held.addresses]
        waiting.leases.add(lease)
        if not held.entries:
            waiting.leases.discard(held)
            waiting.movers.discard(threading.get_ident())  # all that was sent for is here
        return lease

    def _wait(self) -> None:
        """Until an expert or a slot comes. Nothing is held while it waits for a slot."""
        waiting = self._tiers.waiting
        waiting.movers.discard(threading.get_ident())
        if self._held.entries:
            waiting.wait()
        elif self._wanted:
            with waiting.for_slots():
                waiting.wait()
        else:
            raise StopIteration
