"""Knows which experts a caller holds, and where they are; how they came there it does not know."""

import threading
from collections.abc import Callable
from types import TracebackType

from offload.table import Entry, SlotTable


class Lease:
    """Experts that stay where they are until `release`, which leaving the `with` block calls.

    `addresses` maps each expert to where its bytes begin, in the memory of the tier they were
    asked for. Whoever releases a lease states that nothing reads there any more, except kernels
    that were launched already and read from the device's memory. It belongs to the thread that took
    it: when all threads with leases wait for slots, one of them is told that this cannot end.
    """

    __slots__ = ("_release", "addresses", "entries", "layer", "owner", "table")

    def __init__(
        self,
        layer: int,
        table: SlotTable,
        addresses: dict[int, int],
        entries: list[Entry],
        release: Callable[["Lease"], None],
    ) -> None:
        self.layer = layer
        self.table = table  # the manager's: the tier that holds them
        self.addresses = addresses
        self.entries = entries  # the manager's; empty once released
        self.owner = threading.get_ident()
        self._release = release

    def release(self) -> None:
        """Let the experts go; a second call does nothing."""
        self._release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release(self)
