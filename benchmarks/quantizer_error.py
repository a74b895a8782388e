"""Error and speed of the quantizer on Gaussian weights: every scheme, plain rounding beside it.

    python benchmarks/quantizer_error.py [--json FILE]

Error is the signal-to-noise ratio in dB (larger is better); speed is bf16 source a second on one
thread, median of several repeats. Prints a Markdown table.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quant.quantize import Method, dequantize, quantize
from quant.scheme import BITS, GROUP_SIZES, QuantScheme

SHAPE = (2048, 4096)
METHODS: tuple[Method, ...] = ("nearest", "searched")


@dataclass(frozen=True)
class Row:
    """One scheme and method; megabytes are 10^6 bytes of bf16."""

    scheme: str
    method: str
    bpw: float
    snr_db: float
    megabytes_per_s: float


def measure(scheme: QuantScheme, method: Method, repeats: int) -> Row:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        quantized = quantize(weight, scheme, method)
        seconds.append(time.perf_counter() - started)
    exact = weight.double()
    noise = (dequantize(quantized).double() - exact).pow(2).sum() / exact.pow(2).sum()
    speed = weight.nbytes / statistics.median(seconds) / 1e6
    return Row(scheme.name, method, scheme.bpw, -10 * math.log10(float(noise)), speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| scheme | scales | bits a weight | SNR, dB | MB/s |\n|---|---|---|---|---|")
    rows = []
    for bits in BITS:
        for group_size in GROUP_SIZES:
            for method in METHODS:
                row = measure(QuantScheme(bits, group_size), method, options.repeats)
                rows.append(row)
                print(
                    f"| {row.scheme} | {row.method} | {row.bpw:.3g} | {row.snr_db:.2f} "
                    f"| {row.megabytes_per_s:.0f} |"
                )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
