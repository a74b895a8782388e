"""Knows who stays and who goes in one tier: plain Python, no slots, no bytes, no threads."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from offload.keys import ExpertKey


class Policy(Protocol):
    """Ranks the residents of a tier. It is told of every change and asked for victims only.

    The same object serves a live cache and the replay of a trace, so it must depend on nothing
    but the calls it gets: no clock, no randomness without a fixed seed.
    """

    @property
    def capacity(self) -> int:
        """How many residents the tier holds at most."""
        ...

    def touch(self, key: ExpertKey) -> None:
        """A resident was asked for."""
        ...

    def admit(self, key: ExpertKey) -> None:
        """`key` became resident; there is room for it."""
        ...

    def remove(self, key: ExpertKey) -> None:
        """`key` is resident no more."""
        ...

    def victim(self, is_pinned: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Whom to evict next among those not pinned; None when all are. Changes nothing."""
        ...

    def __iter__(self) -> Iterator[ExpertKey]:
        """All residents."""
        ...

    def __len__(self) -> int: ...


PolicyFactory = Callable[[int], Policy]  # capacity -> policy


class LruPolicy:
    """Evicts whoever was not asked for the longest."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1, "a tier without slots"
        self.capacity = capacity
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()  # longest not asked for first
        self.touch = self._order.move_to_end  # bound once: called for every hit of every token

    def admit(self, key: ExpertKey) -> None:
        assert key not in self._order, f"{key} admitted twice"
        assert len(self._order) < self.capacity, f"no room for {key}"
        self._order[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, is_pinned: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        for key in self._order:
            if not is_pinned(key):
                return key
        return None

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
