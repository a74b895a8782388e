"""Knows who computes: kernels, or plain PyTorch, in all rooms at once; not what they compute."""

import torch

from moecli.models import fused
from offload import device_ops, lane_ops
from quant import ops


def use_kernels(name: str, device: torch.device) -> None:
    """Choose for everything that computes on `device`: auto, reference, torch, cpu or triton.

    Raises QuantError where these kernels cannot run.
    """
    ops.set_backend(name)
    fused.set_backend("reference" if name in ("torch", "cpu") else name)
    device_ops.set_backend("torch" if name in ("reference", "cpu") else name)
    if device.type == "cpu":
        lane_ops.interpret_kernels(name == "triton")


def fallback(name: str) -> str | None:
    """What a user is to be told where the processor computes slowly with kernels `name`."""
    missing = ops.fallback() if name == "auto" else None
    if missing is None:
        return None
    return (
        f"{missing.message}: the processor computes with plain PyTorch, several times slower; "
        "`moecli doctor` says how to get them"
    )
