"""Knows who computes: kernels, or plain PyTorch, in all rooms at once; not what they compute."""

import torch

from moecli.models import fused
from offload import device_ops, lane_ops
from quant import ops


def use_kernels(name: str, device: torch.device) -> None:
    """Choose for everything that computes on `device`: auto, reference, torch or triton.

    Raises QuantError where these kernels cannot run.
    """
    ops.set_backend(name)
    fused.set_backend("reference" if name == "torch" else name)
    device_ops.set_backend("torch" if name == "reference" else name)
    if device.type == "cpu":
        lane_ops.interpret_kernels(name == "triton")
