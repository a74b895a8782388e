"""Checkpoints that are quantized already, read as if they were not."""
