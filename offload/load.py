"""Knows how busy others keep this machine's processors while something is done here."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")
_STAT = Path("/proc/stat")
_IDLE = slice(3, 5)  # idling, and waiting for a disk
_ALL = slice(0, 8)  # what follows is counted in these already


def busy_seconds() -> float | None:
    """Processor time of the whole machine since it was started, less idling; None: not known."""
    try:
        with _STAT.open(encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:]]
        per_second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # no Linux
        return None
    return (sum(ticks[_ALL]) - sum(ticks[_IDLE])) / per_second


def beside_others(task: Callable[[], _Result]) -> tuple[_Result, float]:
    """What `task` returns, and how many cores others kept busy meanwhile; 0.0 where unknown.

    The system counts in hundredths of a second: of a task that takes less than five of
    them nothing is said. What this process' children use counts as others'.
    """
    begin, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    result = task()
    seconds, own, after = time.perf_counter() - begin, time.process_time() - own, busy_seconds()
    if busy is None or after is None or seconds < 0.05:
        return result, 0.0
    return result, max(0.0, after - busy - own) / seconds
