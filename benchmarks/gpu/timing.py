"""Knows how long launches take on a device, without the time that the host needs for them."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]
_WARMUPS = 2


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(launches: Sequence[Launch], device: torch.device, repeats: int = 9) -> float:
    """Median over `repeats` rounds of the seconds that one of `launches` takes.

    On CUDA all of them are one graph, and rounds are replays of it: what is measured are kernels
    in a row. Launches should touch different memory, more than any cache holds.
    """
    if device.type == "cuda":
        return statistics.median(_replays(launches, repeats)) / len(launches)
    return statistics.median(_rounds(launches, repeats)) / len(launches)


def _rounds(launches: Sequence[Launch], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for launch in launches:
            launch()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _replays(launches: Sequence[Launch], repeats: int) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles what is not compiled yet
        for launch in launches[:_WARMUPS]:
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(_WARMUPS):
        graph.replay()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return seconds


def wall_seconds(
    action: Launch, device: torch.device, repeats: int = 5, warmups: int = 1
) -> list[float]:
    """Seconds by the clock on the wall, of each run, until the device is done."""
    for _ in range(warmups):
        action()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds
