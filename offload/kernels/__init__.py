"""Kernels of this package, written in Triton; imported only where one is about to run."""
