"""Knows where it is kept which experts of a model are wanted most; counts and places none."""

from collections.abc import Callable
from pathlib import Path

from moecli.models.facts import ModelFacts
from offload.errors import OffloadError
from offload.keys import ExpertKey
from offload.usage import ExpertUsage


class Favourites:
    """What earlier runs of a model asked for, and what this one does.

    With no `path` nothing is known and nothing is kept. A file that cannot be read or written is
    said aloud through `notify`; a run does not fail for it.
    """

    def __init__(self, path: Path | None, spec: ModelFacts, notify: Callable[[str], None]) -> None:
        self._path, self._spec, self._notify = path, spec, notify
        self.usage = self._nothing()  # of this run
        self.keys: list[ExpertKey] = self._before().favourites()  # the most wanted first

    def keep(self) -> None:
        """Add this run to the file; called once, at its end."""
        if self._path is None or not self.usage.num_requests:
            return
        whole = self._before()
        whole.add_counts(self.usage.counts)
        try:
            whole.save(self._path)
        except OffloadError as error:
            self._notify(f"which experts were wanted is not kept: {error.message}")

    def _nothing(self) -> ExpertUsage:
        return ExpertUsage(self._spec.moe_layers, self._spec.num_experts)

    def _before(self) -> ExpertUsage:
        found = self._nothing()
        if self._path is not None:
            try:
                found.add_file(self._path)
            except OffloadError as error:
                self._notify(f"which experts were wanted before is not known: {error.message}")
        return found
