"""Knows when two results count as the same, and how kernels are made to compute on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moecli.backends import use_kernels
from moecli.models import fused
from offload import device_ops, lane_ops
from quant import ops

EXACT = 1e-4  # of the largest value: fp32 sums in another order
HALF = 3e-2  # where numbers pass through 16 bits


class Mismatch(Exception):
    """A fast path and a plain one disagree."""


def agree(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise Mismatch unless all numbers are within `tolerance` of the largest expected one."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    worst = float((found - expected).abs().max())
    bound = tolerance * float(expected.abs().max().clamp(min=1e-6))
    if not worst <= bound:  # so that NaN is a mismatch
        raise Mismatch(f"{what}: off by {worst:.3g}, at most {bound:.3g} is right")


def equal(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise Mismatch unless both are the same to the bit."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not torch.equal(found, expected):
        count = int((found != expected).sum())
        raise Mismatch(f"{what}: {count} of {expected.numel()} values differ")


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def kernels_chosen(device: torch.device) -> Iterator[None]:
    """Triton kernels compute meanwhile: on the device "cpu" too, where they are interpreted."""
    rooms: tuple[Any, ...] = (ops, fused, device_ops)
    before = [room.current_backend() for room in rooms]
    use_kernels("triton", device)
    try:
        yield
    finally:
        for room, name in zip(rooms, before, strict=True):
            room.set_backend(name)
        lane_ops.interpret_kernels(False)
