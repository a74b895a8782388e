"""Error of 4-bit and 8-bit weights, moecli's schemes beside llama.cpp's, on the same matrices.

    python benchmarks/weight_error.py --peer-python PATH [--json FILE]

PATH as for benchmarks/vs_llama_cpp.py. The matrices: normal numbers, and experts of the embedded
model, which somebody trained. Error is the signal-to-noise ratio in dB: larger is better. Neither
side is told which weights matter more (llama.cpp's "importance matrix"). Prints a Markdown table.
"""

import argparse
import json
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from benchmarks.llama.workers import Worker
from moecli.store import demo_source
from quant.checkpoint import Checkpoint
from quant.quantize import dequantize, quantize
from quant.scheme import QuantScheme

SCHEMES = ("int4-g32", "int4-g64", "int4-g128", "int8-g128")
THEIRS = ("Q4_0", "Q4_K", "Q8_0")
NORMAL_SHAPE = (2048, 4096)


def matrices() -> dict[str, Tensor]:
    """Weights [O, I] fp32, of values that bf16 has."""
    normal = torch.randn(NORMAL_SHAPE, generator=torch.Generator().manual_seed(0))
    return {"normal numbers": normal.bfloat16().float(), "trained experts": _trained()}


def _trained() -> Tensor:
    """Gate and up projections of the embedded model, one below the other."""
    source = Checkpoint.open(demo_source())
    names = [name for name in source.tensors if name.endswith("experts.gate_up_proj")]
    parts = [source.read(name).float().transpose(1, 2) for name in names]  # [E, 2I, H]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def snr_db(exact: Tensor, found: Tensor) -> float:
    noise = (found.double() - exact.double()).pow(2).sum() / exact.double().pow(2).sum()
    return -10 * math.log10(float(noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=os.environ.get("MOECLI_PEER_PYTHON"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if not options.peer_python:
        raise SystemExit("error: which Python has llama-cpp-python? give `--peer-python PATH`")
    torch.set_num_threads(1)
    weights, rows = matrices(), []
    for name in SCHEMES:
        scheme = QuantScheme.parse(name)
        found = {
            kind: snr_db(weight, dequantize(quantize(weight.bfloat16(), scheme)))
            for kind, weight in weights.items()
        }
        rows.append({"what": f"moecli {name}", "bits_a_weight": scheme.bpw, "snr_db": found})
    with (
        TemporaryDirectory() as folder,
        Worker(options.peer_python, "benchmarks.llama.peer_rounding", Path(folder) / "log") as peer,
    ):
        for quant in THEIRS:
            found, bits = {}, 0.0
            for kind, weight in weights.items():
                np.save(Path(folder) / "weight.npy", weight.numpy())
                bits = peer.ask("round", folder=folder, kind=quant)
                rounded = torch.from_numpy(np.load(Path(folder) / "rounded.npy"))
                found[kind] = snr_db(weight, rounded)
            rows.append({"what": f"llama.cpp {quant}", "bits_a_weight": bits, "snr_db": found})
    print("| | bits a weight | " + " | ".join(f"{kind}, dB" for kind in weights) + " |")
    print("|---|---|" + "---|" * len(weights))
    for row in rows:
        cells = " | ".join(f"{row['snr_db'][kind]:.2f}" for kind in weights)
        print(f"| {row['what']} | {row['bits_a_weight']:.4g} | {cells} |")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
