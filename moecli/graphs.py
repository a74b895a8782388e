"""Knows how a step whose shapes never change is done again and again; not what the step does."""

from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], None]
_WARMUPS = 2  # the first compiles kernels, the second shows that nothing is left to compile


class Replay(Protocol):
    """A step that can be done again."""

    def __call__(self) -> None: ...


Capture = Callable[[Step], Replay]


def eager(step: Step) -> Replay:
    """No capture: each time the host launches every kernel anew."""
    return step


def captured(step: Step) -> Replay:
    """The step as one CUDA graph: the host launches it whole and has no part in it.

    The step runs a few times first; what it changes the caller must set right afterwards.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads copy experts meanwhile; only what this one does must be fit for a graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
