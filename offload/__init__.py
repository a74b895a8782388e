"""Bytes: which expert is where, and what moves when.

A leaf: imports neither quant nor moecli, and knows nothing of what the bytes mean.
"""
