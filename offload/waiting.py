"""Knows which threads wait for each other, and tells one of them when that cannot end.

One lock for all bookkeeping, one condition on it. What can still end a wait is a thread that moves
bytes, or one that holds a lease and will release it; when all of those wait themselves, nothing
ever will.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload.lease import Lease


class Waiting:
    """Everything but `lock` is used with the lock held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.leases: set[Lease] = set()  # those that are held
        self.movers: set[int] = set()  # threads that move bytes, or are about to
        self.starved: set[int] = set()  # threads that wait for slots
        self._changed = threading.Condition(self.lock)
        self._num_waiting = 0
        self._blocked: set[int] = set()  # threads that wait, and found nothing since the last news

    def notify(self) -> None:
        """Something changed: whoever waits looks again."""
        if self._num_waiting:
            self._blocked.clear()
            self._changed.notify_all()

    def wait(self) -> None:
        """Until something changes. An AssertionError where nothing can."""
        me = threading.get_ident()
        self._blocked.add(me)
        self._num_waiting += 1
        try:
            assert not self._is_stuck(), (
                "a request waits for slots that only its own thread's leases hold, "
                "or those of threads that wait too"
            )
            self._changed.wait()
        finally:
            self._num_waiting -= 1
            self._blocked.discard(me)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until a condition holds that threads bring about which are not known here."""
        self._num_waiting += 1
        try:
            self._changed.wait_for(condition)
        finally:
            self._num_waiting -= 1

    def _is_stuck(self) -> bool:
        blocked = self._blocked
        return self.movers <= blocked and all(lease.owner in blocked for lease in self.leases)

    @contextmanager
    def for_slots(self) -> Iterator[None]:
        """Around waits for slots: guesses take none meanwhile."""
        me = threading.get_ident()
        self.starved.add(me)
        try:
            yield
        finally:
            self.starved.discard(me)

    def end_move(self) -> None:
        """The calling thread has moved what it was to move."""
        self.movers.discard(threading.get_ident())
        self.notify()
