"""Knows what the router asked for and what it met, keeps it, and replays it on other caches.

Plain Python: no torch, no bytes, no threads.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from offload.errors import OffloadError
from offload.policy import LruPolicy, PolicyFactory
from offload.table import SlotTable

_FORMAT = "moecli-trace"
_VERSION = 1


class TraceEvent(NamedTuple):
    """One request: the distinct experts of a layer, how many were met, bytes fetched from disk."""

    step: int
    layer: int
    experts: tuple[int, ...]
    hits: int
    nbytes: int


class Trace:
    """Requests in the order in which they were answered; only the last `limit` when one is given.

    `num_dropped` counts those that were forgotten.
    """

    def __init__(self, events: Iterable[TraceEvent] = (), limit: int | None = None) -> None:
        self._events: deque[TraceEvent] = deque(maxlen=limit)
        self.num_dropped = 0
        for event in events:
            self.append(event)

    def append(self, event: TraceEvent) -> None:
        if len(self._events) == self._events.maxlen:
            self.num_dropped += 1
        self._events.append(event)

    def __iter__(self) -> Iterator[TraceEvent]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    @property
    def num_requests(self) -> int:
        """Experts asked for, each (step, layer, expert) once a request."""
        return sum(len(event.experts) for event in self._events)

    @property
    def num_hits(self) -> int:
        return sum(event.hits for event in self._events)

    @property
    def nbytes(self) -> int:
        return sum(event.nbytes for event in self._events)

    def counts(self) -> dict[int, dict[int, int]]:
        """How often each expert was asked for: layer -> expert -> requests."""
        counts: dict[int, dict[int, int]] = {}
        for event in self._events:
            of_layer = counts.setdefault(event.layer, {})
            for expert in event.experts:
                of_layer[expert] = of_layer.get(expert, 0) + 1
        return counts

    def save(self, path: Path) -> None:
        """Write JSON lines, a header first; an existing file is replaced when all is written."""
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                header = {"format": _FORMAT, "version": _VERSION, "num_dropped": self.num_dropped}
                file.write(json.dumps(header) + "\n")
                for event in self._events:
                    file.write(json.dumps(event._asdict(), separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OffloadError(f"cannot write the trace `{path}`: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read what `save` wrote; OffloadError, naming the line, for anything else."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise OffloadError(f"cannot read the trace `{path}`: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise OffloadError(f"`{path}` is no trace: it is not UTF-8") from error
        header = _parse(path, 1, lines[0]) if lines else {}
        if header.get("format") != _FORMAT or header.get("version") != _VERSION:
            raise OffloadError(
                f"`{path}` is no trace of version {_VERSION}", "record it again with this version"
            )
        trace = cls(_event(path, number, line) for number, line in enumerate(lines[1:], 2))
        num_dropped = header.get("num_dropped")
        trace.num_dropped = num_dropped if isinstance(num_dropped, int) else 0
        return trace


def _parse(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise OffloadError(f"line {number} of the trace `{path}` is no JSON object")
    return value


def _event(path: Path, number: int, line: str) -> TraceEvent:
    value = _parse(path, number, line)
    experts = value.pop("experts", None)
    numbers = [value.pop(name, None) for name in ("step", "layer", "hits", "nbytes")]
    everything = [*numbers, *experts] if isinstance(experts, list) else [None]
    if value or not all(type(item) is int and item >= 0 for item in everything):
        raise OffloadError(f"line {number} of the trace `{path}` is no request")
    step, layer, hits, nbytes = numbers
    return TraceEvent(step, layer, tuple(experts), hits, nbytes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Replay:
    """What a trace would have met in an initially empty cache of `capacity` experts."""

    capacity: int
    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float | None:
        """None when nothing was asked for."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else None


def replay(
    events: Iterable[TraceEvent],
    capacities: Iterable[int],
    policy_factory: PolicyFactory = LruPolicy,
) -> list[Replay]:
    """Run a trace through caches of several sizes, with the manager's own bookkeeping.

    Exact for the top tier of a run with one lease at a time and no read-ahead. A request of more
    experts than a cache has slots is split into waves, as a caller of the manager would.
    """
    recorded = list(events)
    return [_replay_one(recorded, capacity, policy_factory) for capacity in capacities]


def _replay_one(events: list[TraceEvent], capacity: int, policy_factory: PolicyFactory) -> Replay:
    table = SlotTable(policy_factory(capacity), range(capacity))
    hits = misses = 0
    for event in events:
        waves = [event.experts]
        if len(event.experts) > capacity:
            waves = [tuple(wave) for wave in table.waves(event.layer, event.experts)]
        for wave in waves:
            acquired = table.acquire(event.layer, wave)
            assert acquired is not None, "nothing else is pinned"
            _, held, missing = acquired
            for entry in missing:
                table.finish(entry)
            table.unpin(held)
            hits += len(held) - len(missing)
            misses += len(missing)
    return Replay(capacity, hits, misses, table.evictions)
