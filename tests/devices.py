"""Knows where kernels are tested: on the graphics card if there is one, else interpreted."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
