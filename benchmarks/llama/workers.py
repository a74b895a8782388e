"""Knows how workers are started and asked, and who used the processor meanwhile."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.load import busy_seconds

ROOT = Path(__file__).resolve().parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_SETTLE_S = 0.1  # until threads that wait for work in a loop have gone to sleep


@dataclass(frozen=True)
class Answer:
    """What a worker said, and the cores that others kept busy while it was at it."""

    result: Any
    foreign_cores: float


class Worker:
    """A process that does one thing at a time; between requests it sleeps. Close it."""

    def __init__(self, python: str, module: str, log: Path) -> None:
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Raises RuntimeError where the worker fails or dies; its log says more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": "it has died"}
        if "error" in reply:
            raise RuntimeError(f"`{do}`: {reply['error']}; see {self._log}")
        return reply["result"]

    def timed(self, do: str, **arguments: Any) -> Answer:
        """The same with everybody else asleep, or found out not to be."""
        time.sleep(_SETTLE_S)
        begin, busy, own = time.perf_counter(), busy_seconds(), self.cpu_seconds()
        result = self.ask(do, **arguments)
        busy, own = busy_seconds() - busy, self.cpu_seconds() - own
        return Answer(result, max(0.0, busy - own) / (time.perf_counter() - begin))

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, children that have ended included."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        return sum(int(field) for field in text.rpartition(")")[2].split()[11:15]) / _TICKS

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
