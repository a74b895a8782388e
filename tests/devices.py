"""Knows where kernels are tested: on the graphics card if there is one, else interpreted."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reachable(tensor: Tensor) -> Tensor:
    """The same numbers in main memory that kernels on DEVICE can read: pinned for a card."""
    return tensor if DEVICE == "cpu" else tensor.pin_memory()


def examples(count: int) -> int:
    """How many examples of a property to try: on a card every new shape is compiled first."""
    return count if DEVICE == "cpu" else -(-count // 3)
