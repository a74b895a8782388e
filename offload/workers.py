"""Knows a few threads that run small tasks, urgent ones first; not what the tasks are.

The threads end with `close`, with the last reference to their owner, or before the interpreter
does, whichever comes first: none is alive when Python tears itself down.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable

Task = Callable[[], None]


class Workers:
    """`num_workers` threads, started when there is first something to do.

    A task must not raise. One that does anyway stops no thread: `close` raises what it raised.
    """

    def __init__(self, num_workers: int, name: str) -> None:
        assert num_workers >= 0, f"{num_workers} workers"
        self.num_workers = num_workers
        self._name = name
        self._state = _State()
        # Runs at exit too, before daemon threads are cut off in the middle of a read.
        self._finalizer = weakref.finalize(self, _stop, self._state)

    def submit(self, task: Task, urgent: bool = True) -> None:
        """Run `task` soon; there must be at least one worker."""
        state = self._state
        with state.changed:
            assert not state.closed, "the workers are closed"
            assert self.num_workers, "there are no workers"
            (state.urgent if urgent else state.later).append(task)
            pending = len(state.urgent) + len(state.later)
            if pending > state.num_idle and len(state.threads) < self.num_workers:
                name = f"{self._name}-{len(state.threads)}"
                # daemon: joined by the finalizer, which runs later than Python's own join
                thread = threading.Thread(target=_work, args=(state,), name=name, daemon=True)
                thread.start()
                state.threads.append(thread)
            else:
                state.changed.notify()

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._finalizer()
        if self._state.failure is not None:
            failure, self._state.failure = self._state.failure, None
            raise AssertionError("a worker's task raised") from failure


class _State:
    """What the threads share; holds no reference to their owner, so that it can be collected."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.urgent: deque[Task] = deque()
        self.later: deque[Task] = deque()
        self.threads: list[threading.Thread] = []
        self.num_idle = 0
        self.closed = False
        self.failure: BaseException | None = None


def _work(state: _State) -> None:
    while True:
        with state.changed:
            while not (state.urgent or state.later or state.closed):
                state.num_idle += 1
                state.changed.wait()
                state.num_idle -= 1
            if state.closed:
                return
            task: Task | None = (state.urgent or state.later).popleft()
        assert task is not None
        try:
            task()
        except BaseException as failure:  # noqa: BLE001  # kept for close(), see above
            state.failure = failure
        task = None  # an idle thread must not keep its last task's owner alive


def _stop(state: _State) -> None:
    with state.changed:
        state.closed = True
        state.urgent.clear()
        state.later.clear()
        state.changed.notify_all()
        threads = list(state.threads)
    for thread in threads:
        if thread is not threading.current_thread():  # collected by a worker: it ends by itself
            thread.join()
