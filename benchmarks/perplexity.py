"""Perplexity of a checkpoint on held-out text: as stored, and quantized in every way moecli offers.

    python benchmarks/perplexity.py [MODEL_DIR] [--heldout DIR] [--json FILE]

Weights are quantized and dequantized in memory and the model is run in float32, so that only the
rounding of weights is measured. Prints a Markdown table; `--json` writes the same figures.
"""
