"""Knows which expert is in which slot of one tier, and who may not be moved; no bytes, no threads.

The live manager (under its lock) and the replay of a trace run this very class, so that a
simulated hit is a hit.
"""

from collections.abc import Iterable, Sequence

from offload.keys import ExpertKey, describe
from offload.policy import Policy


class Entry:
    """An expert that is in a slot, or on its way there."""

    __slots__ = ("address", "ahead", "error", "key", "pins", "ready", "slot")

    def __init__(self, key: ExpertKey, slot: int, address: int, ahead: bool) -> None:
        self.key = key
        self.slot = slot
        self.address = address
        self.pins = 1  # its loader's
        self.ready = False
        self.ahead = ahead  # read ahead, and not asked for yet
        self.error: BaseException | None = None  # why it never came; then it is in no table


class SlotTable:
    """The slots of one tier, one for each address; `keep=False` forgets an expert when unpinned."""

    def __init__(self, policy: Policy, addresses: Sequence[int], keep: bool = True) -> None:
        assert policy.capacity == len(addresses) >= 1, "the policy and the slots disagree"
        self.capacity = len(addresses)
        self.entries: dict[ExpertKey, Entry] = {}
        self.num_loading = 0
        self.evictions = 0
        self.ahead_used = 0  # experts read ahead that were then asked for
        self.ahead_wasted = 0  # and those that were evicted before
        self._policy = policy
        self._addresses = addresses
        self._keep = keep
        self._free = list(range(self.capacity - 1, -1, -1))
        self._num_pinned = 0  # entries with at least one pin
        self._guesses: dict[ExpertKey, Entry] = {}  # read ahead and not asked for yet, oldest first

    @property
    def num_reclaimable(self) -> int:
        """Slots that are free or hold an expert nobody has pinned."""
        return len(self._free) + len(self.entries) - self._num_pinned

    def acquire(
        self, layer: int, experts: Sequence[int]
    ) -> tuple[dict[int, int], list[Entry], list[Entry]] | None:
        """Pin all of these at once, reserving slots for the missing.

        Returns (address of each expert, all entries, those of them that must now be loaded), or
        None, with nothing pinned, when too few slots can be had. Residents are touched in the
        order asked, then the missing admitted in that order.
        """
        addresses: dict[int, int] = {}
        held: list[Entry] = []
        absent: list[ExpertKey] = []
        entries, touch = self.entries, self._policy.touch
        for expert in experts:
            if expert in addresses:
                continue
            key = (layer, expert)
            entry = entries.get(key)
            if entry is None:
                addresses[expert] = 0  # its place in the order; filled in below
                absent.append(key)
                continue
            if not entry.pins:
                self._num_pinned += 1
            entry.pins += 1
            touch(key)
            if entry.ahead:
                self.note_use(entry)
            addresses[expert] = entry.address
            held.append(entry)
        if not absent:
            return addresses, held, []
        if len(absent) > self.num_reclaimable:
            self.unpin(held)
            assert len(addresses) <= self.capacity, (
                f"{len(addresses)} experts asked for at once, but there are {self.capacity} slots"
            )
            return None
        missing = [self.reserve(key) for key in absent]
        for entry in missing:
            entry.pins += 1
            addresses[entry.key[1]] = entry.address
        return addresses, held + missing, missing

    def note_use(self, entry: Entry) -> None:
        """An expert that was read ahead has been asked for."""
        self._forget_guess(entry)
        self.ahead_used += 1

    def _forget_guess(self, entry: Entry) -> None:
        entry.ahead = False
        del self._guesses[entry.key]

    def reserve(self, key: ExpertKey, ahead: bool = False) -> Entry:
        """A slot for a missing expert, pinned by its loader until `finish` or `fail`."""
        assert key not in self.entries, f"{describe(key)} is here already"
        if not self._free:
            victim = self._policy.victim(self._is_pinned)
            assert victim is not None, "no slot can be reclaimed"
            self.evictions += 1
            self._drop(self.entries[victim])
        slot = self._free.pop()
        entry = Entry(key, slot, self._addresses[slot], ahead)
        self.entries[key] = entry
        if ahead:
            self._guesses[key] = entry
        self._policy.admit(key)
        self._num_pinned += 1
        self.num_loading += 1
        return entry

    def reserve_guess(self, key: ExpertKey) -> Entry | None:
        """A slot for an expert that may be asked for, as `reserve` gives; None where none is due.

        Guesses hold at most half of the slots. Beyond that one for another layer makes way, being
        older; none ever makes way for another of its own layer.
        """
        if len(self._guesses) >= self.capacity // 2:
            of_others = (k for k, e in self._guesses.items() if k[0] != key[0] and not e.pins)
            victim = next(of_others, None)
        elif self._free:
            return self.reserve(key, ahead=True)
        else:
            victim = self._policy.victim(
                lambda other: (
                    self._is_pinned(other) or (other[0] == key[0] and other in self._guesses)
                )
            )
        if victim is None:
            return None
        self.evictions += 1
        self._drop(self.entries[victim])
        return self.reserve(key, ahead=True)

    def _is_pinned(self, key: ExpertKey) -> bool:
        return self.entries[key].pins > 0

    def finish(self, entry: Entry) -> None:
        """The bytes are there; the loader's pin ends."""
        entry.ready = True
        self.num_loading -= 1
        self.unpin((entry,))

    def fail(self, entry: Entry, error: BaseException) -> None:
        """The bytes will not come: the slot is free again, and waiters find the error."""
        assert not entry.ready, f"{describe(entry.key)} failed after it came"
        assert entry.error is None, f"{describe(entry.key)} failed twice"
        entry.error = error
        if entry.ahead:
            self._forget_guess(entry)  # neither used nor wasted
        self.num_loading -= 1
        self._num_pinned -= 1
        self._drop(entry)

    def pin(self, entry: Entry) -> None:
        if not entry.pins:
            self._num_pinned += 1
        entry.pins += 1
        self._policy.touch(entry.key)

    def unpin(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.error is not None:
                continue  # it left the table when it failed
            assert entry.pins > 0, f"{describe(entry.key)} released more often than pinned"
            entry.pins -= 1
            if not entry.pins:
                self._num_pinned -= 1
                if not self._keep:
                    self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self._policy.remove(entry.key)
        self._free.append(entry.slot)
        if entry.ahead:
            self._forget_guess(entry)
            self.ahead_wasted += 1

    def residents_first(self, layer: int, experts: Sequence[int]) -> list[int]:
        """These experts, each once: those that are here or on their way, then the others."""
        wanted = sorted(set(experts))
        wanted.sort(key=lambda expert: (layer, expert) not in self.entries)  # stable
        return wanted

    def fitting(self, layer: int, experts: Iterable[int]) -> int:
        """How many of these distinct experts, from the first on, `acquire` could pin now."""
        count, room = 0, self.num_reclaimable
        for expert in experts:
            entry = self.entries.get((layer, expert))
            room -= entry is None or not entry.pins
            if room < 0:
                break
            count += 1
        return count

    def waves(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """These experts in groups that fit the slots, residents first, ascending within each."""
        wanted = self.residents_first(layer, experts)
        return [wanted[i : i + self.capacity] for i in range(0, len(wanted), self.capacity)]

    def check_integrity(self) -> None:
        """Assert that slots, pins, free list and policy agree."""
        slots = [entry.slot for entry in self.entries.values()]
        assert len(set(slots)) == len(slots), "a slot holds two experts"
        assert sorted(slots + self._free) == list(range(self.capacity)), "a slot is lost or doubled"
        assert len(self._policy) == len(self.entries), "the policy ranks others than the residents"
        assert set(self._policy) == set(self.entries), "the policy ranks others than the residents"
        ahead = {key for key, entry in self.entries.items() if entry.ahead}
        assert set(self._guesses) == ahead, "the list of guesses is wrong"
        pinned = loading = 0
        for key, entry in self.entries.items():
            assert entry.key == key, f"{describe(key)} is filed as {describe(entry.key)}"
            assert entry.address == self._addresses[entry.slot], f"{describe(key)} has moved"
            assert entry.error is None, f"{describe(key)} failed, but is here"
            assert entry.pins >= (not entry.ready), f"{describe(key)} loads without a pin"
            assert entry.pins or self._keep, f"{describe(key)} was kept"
            pinned += entry.pins > 0
            loading += not entry.ready
        assert pinned == self._num_pinned, "the count of pinned experts is wrong"
        assert loading == self.num_loading, "the count of loading experts is wrong"
