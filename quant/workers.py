"""Knows how a sequence is worked on by several threads while its results are used in order.

Each thread computes alone: torch's own threads wait for each other after every operation, which
costs most of the time where another process takes one of their cores.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as torch has when they begin; until they end, torch has one a thread."""

    def __enter__(self) -> "Workers":
        self.count = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.count)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """function(item) of each, in order; items are taken no more than needed to keep all busy.

        Raises what `function` raises, when it is that item's turn.
        """
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(self._pool.submit(function, item))
                if len(ahead) > self.count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
