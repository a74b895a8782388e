"""Knows how fast the memories of this machine are while a benchmark runs; knows no model."""

import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from moecli.measuring import largest_file
from offload.bandwidth import measure_disk
from offload.hardware import Machine, detect
from offload.measured import with_bandwidths

_CODE = (
    "import sys; from offload.bandwidth import measure_ram; print(measure_ram(int(sys.argv[1])))"
)


class BenchMachine:
    """This machine; main memory is measured again and again, as its speed changes."""

    def __init__(self, model: Path, on_device: bool, threads: int) -> None:
        """`model`: the directory whose disk is measured, once."""
        machine = detect(model, gpu=on_device)
        if on_device:
            machine = with_bandwidths(machine)
        largest = largest_file(model)
        assert largest is not None, "a model without weights"
        self._machine = replace(machine, disk_bw=measure_disk(largest).bytes_per_s)
        self._threads = threads
        self._ram_bws: list[float] = []

    def now(self) -> Machine:
        """With main memory as fast as it is at this moment."""
        found = ram_bandwidth(self._threads)
        if found is not None:
            self._ram_bws.append(found)
        return replace(self._machine, ram_bw=found)

    def typical(self) -> Machine:
        """With the median of what was measured so far."""
        bws = self._ram_bws
        return replace(self._machine, ram_bw=statistics.median(bws) if bws else None)


def ram_bandwidth(threads: int) -> float | None:
    """Bytes a second that so many threads read; None where that cannot be measured.

    In a process of its own: what it reads would count towards the peak memory of this one.
    """
    command = [sys.executable, "-c", _CODE, str(threads)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None if found == "None" else float(found)
