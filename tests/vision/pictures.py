"""Pictures made of integers alone: the same on every machine, and never flat."""

import torch
from torch import Tensor


def pattern(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [3, height, width] with slopes, edges and noise."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    channels = [
        (x * x * (c + 1 + seed) // 7 + y * (5 + 3 * c) + x * y // (3 + c + seed)) % 256
        for c in range(3)
    ]
    return torch.stack(channels).to(torch.uint8)
