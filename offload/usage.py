"""Knows how often each expert of a model was asked for, over all its runs; not where experts lie.

Plain Python: standard library only. Kept in a small JSON file, so that the next run can begin with
the experts that were wanted most.
"""

import json
import os
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from offload.errors import OffloadError
from offload.keys import ExpertKey

_FORMAT = "moecli-usage"
_VERSION = 1


class ExpertUsage:
    """Requests of each expert of each layer; a request is one expert in one step of one layer."""

    def __init__(self, layers: Iterable[int], num_experts: int) -> None:
        self._counts = {layer: array("q", bytes(8 * num_experts)) for layer in layers}
        self._num_experts = num_experts

    def add(self, layer: int, experts: Iterable[int]) -> None:
        """These distinct experts were asked for once."""
        counts = self._counts[layer]
        for expert in experts:
            counts[expert] += 1

    def row(self, layer: int) -> "array[int]":
        """Requests of each expert of a layer, int64 [E], where whoever is quick may count too."""
        return self._counts[layer]

    def add_counts(self, counts: Mapping[int, list[int]]) -> None:
        """layer -> requests of each expert."""
        for layer, row in counts.items():
            assert len(row) == self._num_experts, f"{len(row)} counts in layer {layer}"
            for expert, count in enumerate(row):
                self._counts[layer][expert] += count

    @property
    def counts(self) -> dict[int, list[int]]:
        """layer -> requests of each expert."""
        return {layer: list(row) for layer, row in self._counts.items()}

    @property
    def num_requests(self) -> int:
        return sum(sum(row) for row in self._counts.values())

    def favourites(self) -> list[ExpertKey]:
        """Those that were asked for at all, the most wanted first; ties in the model's order."""
        asked = [
            (-count, layer, expert)
            for layer, row in self._counts.items()
            for expert, count in enumerate(row)
            if count
        ]
        return [(layer, expert) for _, layer, expert in sorted(asked)]

    def save(self, path: Path) -> None:
        """Write the file, its folder too; an old one is replaced when all is written.

        Raises OffloadError where that cannot be done.
        """
        content = {"format": _FORMAT, "version": _VERSION}
        counts = {str(layer): list(row) for layer, row in self._counts.items()}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**content, "counts": counts}), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OffloadError(f"cannot write `{path}`: {error.strerror}") from error

    def add_file(self, path: Path) -> None:
        """Add what `save` wrote; no file adds nothing.

        Raises OffloadError for anything else, a file of another model too.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except OSError as error:
            raise OffloadError(f"cannot read `{path}`: {error.strerror}") from error
        except ValueError:
            content = None
        counts = self._parsed(content)
        if counts is None:
            raise OffloadError(
                f"`{path}` does not count the experts of this model", "remove it: it is made anew"
            )
        self.add_counts(counts)

    def _parsed(self, content: object) -> dict[int, list[int]] | None:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return None
        rows = content.get("counts")
        if content.get("version") != _VERSION or not isinstance(rows, dict):
            return None
        if set(rows) != {str(layer) for layer in self._counts}:
            return None
        if not all(self._is_row(row) for row in rows.values()):
            return None
        return {int(layer): row for layer, row in rows.items()}

    def _is_row(self, row: object) -> bool:
        return (
            isinstance(row, list)
            and len(row) == self._num_experts
            and all(type(count) is int and count >= 0 for count in row)
        )
