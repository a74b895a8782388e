"""Knows which experts may be wanted soon, and has workers fetch them where there is room."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from offload.keys import ExpertKey, describe
from offload.table import Entry
from offload.tiers import Tiers
from offload.workers import Workers

AHEAD_LIMIT = 256  # guesses that wait at most; the oldest go first


@dataclass(frozen=True)
class _Task:
    """A guess whose slots are reserved, so that fetching it waits for nobody's slot."""

    staged: Entry  # in main memory; pinned by us if it goes on to `top`
    must_read: bool  # or it is there already, or somebody else is reading it
    top: Entry | None  # in the device


class ReadAhead:
    """Fetches guesses into main memory, where that hides the disk, or to the device as well.

    A guess takes no slot that anybody holds or waits for. It is dropped when it finds none, when
    newer ones overtake it, or when its layer begins first.
    """

    def __init__(self, tiers: Tiers, workers: Workers) -> None:
        self._tiers, self._workers = tiers, workers
        self._queue: dict[ExpertKey, bool] = {}  # in the order they came; True: to the device
        self._num_running = 0

    def add(self, layer: int, experts: Sequence[int], to_device: bool) -> None:
        """Guess that `layer` will want these experts; returns at once."""
        tiers = self._tiers
        to_device = to_device and tiers.device is not None
        with tiers.waiting.lock:
            added = 0
            for expert in experts:
                key = (layer, expert)
                here = key in tiers.top.entries or (not to_device and key in tiers.host.entries)
                if here:
                    continue
                if key in self._queue:
                    self._queue[key] |= to_device
                    continue
                assert key in tiers.disk, f"{describe(key)} is in no file"
                self._queue[key] = to_device
                added += 1
            while len(self._queue) > AHEAD_LIMIT:
                del self._queue[next(iter(self._queue))]
                tiers.counts.prefetch_dropped += 1
            added = min(added, self._workers.num_workers)
        for _ in range(added):
            self._workers.submit(self._work, urgent=False)

    def forget(self, layer: int) -> None:
        """What the layer wanted is known now; under the lock."""
        if self._queue:
            for key in [key for key in self._queue if key[0] == layer]:
                del self._queue[key]
                self._tiers.counts.prefetch_dropped += 1

    def clear(self) -> int:
        """Drop the guesses that nobody has begun to fetch; returns how many. Under the lock."""
        count = len(self._queue)
        self._queue.clear()
        self._tiers.counts.prefetch_dropped += count
        self._tiers.waiting.notify()
        return count

    def is_idle(self) -> bool:
        """Whether every guess is fetched or dropped; under the lock."""
        return not self._queue and not self._num_running

    def _work(self) -> None:
        """A worker's task: fetch guesses until none is left."""
        waiting = self._tiers.waiting
        while True:
            with waiting.lock:
                task = self._next()
                if task is None:
                    waiting.notify()
                    return
                self._num_running += 1
                waiting.movers.add(threading.get_ident())
            try:
                self._fetch(task)
            except BaseException as error:  # noqa: BLE001  # a waiting ensure finds it in the entry
                with waiting.lock:
                    self._give_up(task, error)
            finally:
                with waiting.lock:
                    self._num_running -= 1
                    waiting.end_move()

    def _next(self) -> _Task | None:
        while self._queue:
            key = next(iter(self._queue))
            task = self._reserve(key, self._queue.pop(key))
            if task is not None:
                return task
            self._tiers.counts.prefetch_dropped += 1
        return None

    def _reserve(self, key: ExpertKey, to_device: bool) -> _Task | None:
        """All the slots that a guess needs, or none."""
        host, top = self._tiers.host, self._tiers.top
        staged = host.entries.get(key)
        no_room = staged is None and not host.num_reclaimable
        if no_room or key in top.entries or self._tiers.waiting.starved:
            return None
        in_top = top.reserve_guess(key) if to_device else None
        must_read = staged is None
        if staged is None:
            staged = host.reserve(key, ahead=True)
        elif in_top is None:
            return None  # as far up as it gets
        if in_top is not None:
            host.pin(staged)
        return _Task(staged, must_read, in_top)

    def _fetch(self, task: _Task) -> None:
        tiers = self._tiers
        lock, counts = tiers.waiting.lock, tiers.counts
        if task.must_read:
            nbytes = tiers.read(task.staged)
            with lock:
                counts.ahead_nbytes += nbytes
                counts.prefetch_reads += 1
                tiers.host.finish(task.staged)
                tiers.waiting.notify()
        if task.top is None:
            return
        with lock:
            tiers.wait_for((task.staged,))
        tiers.copy_up(task.top, task.staged)
        with lock:
            counts.copied_ahead += 1
            if task.staged.ahead:
                tiers.host.note_use(task.staged)
            tiers.top.finish(task.top)
            tiers.host.unpin((task.staged,))

    def _give_up(self, task: _Task, error: BaseException) -> None:
        """Leave no slot reserved; under the lock."""
        tiers = self._tiers
        tiers.counts.prefetch_failed += 1
        if task.must_read and not task.staged.ready:
            tiers.host.fail(task.staged, error)
        if task.top is not None:
            tiers.host.unpin((task.staged,))  # nothing to undo where it failed
            tiers.top.fail(task.top, error)
