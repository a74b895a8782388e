"""Knows how a run is recorded: sections of parts, each with its end, saved as soon as it is known.

A part that fails or comes too late is recorded as such; nothing that was measured is lost by it.
"""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
_TRACE_LINES = 12


class Section:
    """The parts of one section; `save` is called with all results after each."""

    def __init__(self, budget_s: float, save: Callable[[dict[str, Any]], None]) -> None:
        self._end = time.monotonic() + budget_s
        self._begin = time.monotonic()
        self._budget_s = budget_s
        self._save = save
        self._parts: dict[str, Any] = {}

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def part(self, name: str, measure: Callable[[], Any], needs_s: float = 0.0) -> Any:
        """What `measure()` gives, recorded under `name`; None where it fails or time is short.

        `needs_s`: how long it may take; with less time left it is not begun.
        """
        assert name not in self._parts, f"two parts are called {name}"
        begin = time.monotonic()
        if self.left_s < needs_s or self.left_s <= 0:
            left = max(0.0, self.left_s)
            reason = f"{left:.0f} s of {self._budget_s:g} s left, {needs_s:g} s needed"
            return self._record(name, "skipped", begin, reason=reason)
        try:
            result = plain(measure())
        except Exception as error:  # noqa: BLE001 - whatever it is, the next part goes on
            trace = traceback.format_exc().splitlines()[-_TRACE_LINES:]
            text = f"{type(error).__name__}: {error}"
            return self._record(name, "failed", begin, error=text, trace=trace)
        self._record(name, "ok", begin, result=result)
        return result

    def skip(self, name: str, reason: str) -> None:
        self._record(name, "skipped", time.monotonic(), reason=reason)

    def _record(self, name: str, status: str, begin: float, **more: Any) -> None:
        seconds = round(time.monotonic() - begin, 3)
        self._parts[name] = {"status": status, "seconds": seconds, **more}
        self._save(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget_s": self._budget_s,
            "seconds": round(time.monotonic() - self._begin, 3),
            "parts": self._parts,
        }


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses and tuples resolved, floats cut to six digits."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
