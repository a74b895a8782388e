"""Knows the Triton kernels behind moecli.models.fused; imported only where one is launched."""
