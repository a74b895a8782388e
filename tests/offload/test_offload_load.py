"""Who else used the processors meanwhile."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload import load
from offload.load import beside_others, busy_seconds

linux = pytest.mark.skipif(busy_seconds() is None, reason="this system does not say")


def burn(seconds: float) -> float:
    """Returns how much of it this process had a core."""
    begin, own = time.perf_counter(), time.process_time()
    while time.perf_counter() < begin + seconds:
        pass
    return time.process_time() - own


@linux
def test_another_process_is_seen() -> None:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        _, cores = beside_others(lambda: time.sleep(1.0))
    finally:
        other.kill()
        other.wait()
    assert cores > 0.5


@linux
def test_what_is_done_here_is_nobody_elses() -> None:
    own, cores = beside_others(lambda: burn(0.5))
    assert 0 <= cores <= (os.cpu_count() or 1) - own / 0.5 + 0.1


@linux
def test_of_what_is_short_nothing_is_said() -> None:
    assert beside_others(lambda: 7) == (7, 0.0)


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_STAT", Path("/nowhere"))
    assert busy_seconds() is None
    assert beside_others(lambda: time.sleep(0.1) or 7) == (7, 0.0)
