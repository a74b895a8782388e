"""Perplexity with activations in 8 bits, beside the same quantized weights with float activations.

    python benchmarks/activations.py MODEL_DIR [--documents N] [--json FILE]

MODEL_DIR is what `moecli quantize` wrote. "torch" computes with float activations, "cpu" with the
compiled kernels; both read the same text, whole documents at once.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from benchmarks.perplexity import ROOT, Subject, losses
from moecli.config import EngineConfig
from moecli.engine import Engine


def measure(path: Path, heldout: Path, most: int, max_tokens: int) -> dict[str, float]:
    lines = [
        line
        for file in sorted(heldout.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    found: dict[str, torch.Tensor] = {}
    for kernels in ("torch", "cpu"):
        # Of a Subject both functions want the tokenizer and the decoder, which an Engine has too.
        with Engine.open(path, EngineConfig(device="cpu", kernels=kernels)) as engine:
            documents = []
            for line in lines[:: max(1, len(lines) // most)]:
                ids = Subject.token_ids(engine, json.loads(line))  # type: ignore[arg-type]
                documents.append(ids[:max_tokens])
            documents = [ids for ids in documents if len(ids) > 1]
            found[kernels] = losses(engine, engine.decoder, documents)  # type: ignore[arg-type]
    count = sum(len(ids) - 1 for ids in documents)
    change = float((found["cpu"] - found["torch"]).sum()) / count
    return {
        "documents": len(documents),
        "tokens": count,
        "perplexity_float": math.exp(float(found["torch"].sum()) / count),
        "perplexity_8_bits": math.exp(float(found["cpu"].sum()) / count),
        "change": math.expm1(change),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--heldout", type=Path, default=ROOT / "tests" / "fixtures" / "heldout")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a document")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    result = measure(options.model, options.heldout, options.documents, options.max_tokens)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
