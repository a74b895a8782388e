"""Error and speed of the quantizer on Gaussian weights: every scheme, plain rounding beside it.

    python benchmarks/quantizer_error.py [--json FILE]

Error is the signal-to-noise ratio in dB (larger is better); speed is bf16 source a second of the
processor's time on one thread, median of several repeats: by plain torch, and by the kernels for
the processor, in turns. Prints a Markdown table.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from quant import quantize as quantizer
from quant.quantize import Method
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
    megabytes_per_s: float  # by torch
    kernels_megabytes_per_s: float | None  # of what they do, where they are compiled


def measure(scheme: QuantScheme, method: Method, repeats: int) -> Row:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = quantizer._compiled() if method == "searched" else None
    seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether kernels search
    for _ in range(repeats):
        for by_kernels in [False] if compiled is None else [False, True]:
            used = compiled if by_kernels else None
            with mock.patch.object(quantizer, "_compiled", return_value=used):
                started = time.process_time()
                quantized = quantizer.quantize(weight, scheme, method)
                seconds[by_kernels].append(time.process_time() - started)
    exact = weight.double()
    noise = (quantizer.dequantize(quantized).double() - exact).pow(2).sum() / exact.pow(2).sum()
    plain, fast = (
        weight.nbytes / statistics.median(taken) / 1e6 if taken else None
        for taken in seconds.values()
    )
    assert plain is not None, "there is always torch"
    return Row(scheme.name, method, scheme.bpw, -10 * math.log10(float(noise)), plain, fast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| scheme | scales | bits a weight | SNR, dB | MB/s, torch | MB/s, kernels |")
    print("|---|---|---|---|---|---|")
    rows = []
    for bits in BITS:
        for group_size in GROUP_SIZES:
            for method in METHODS:
                row = measure(QuantScheme(bits, group_size), method, options.repeats)
                rows.append(row)
                fast = row.kernels_megabytes_per_s
                print(
                    f"| {row.scheme} | {row.method} | {row.bpw:.4g} | {row.snr_db:.2f} "
                    f"| {row.megabytes_per_s:.0f} | {'' if fast is None else f'{fast:.0f}'} |"
                )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
