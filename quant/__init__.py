"""Numbers: quantization schemes, packing, quantizers, kernels and checkpoint files.

A leaf: imports neither offload nor moecli.
"""
