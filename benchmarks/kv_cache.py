"""What a KV cache in int8 costs in perplexity, and how fast one token attends over it.

    python benchmarks/kv_cache.py [--json FILE]

Perplexity of the embedded model in 16 bits, computed in fp32, on held-out text: only keys and
values are rounded. Attention of one token on one thread, over heads of Llama 4 and of Qwen3-30B,
in turns with bf16. Prints Markdown tables; `--json` writes the same figures.
"""

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.perplexity import ROOT, Subject, Variant
from moecli.kv_cache import KvCache
from moecli.models.attention import attend_kept
from moecli.models.batch import Batch
from moecli.models.decoder import Decoder
from moecli.models.int8_heads import Int8Heads, quantize_heads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
SHAPES = {"Llama 4": (40, 8, 128), "Qwen3-30B-A3B": (32, 4, 128)}  # heads, kv heads, head dim
LENGTHS = (512, 4096, 16384)
ROUNDS, ROUND_S = 9, 0.1


@dataclass(frozen=True)
class PerplexityRow:
    """The change is against fp32, its standard error over documents, paired."""

    kv_dtype: str
    perplexity: float
    change: float
    change_stderr: float


@dataclass(frozen=True)
class AttentionRow:
    """Milliseconds of one token in one layer, medians; the ratio is that of the same rounds."""

    shape: str
    tokens: int
    bf16_ms: float
    int8_ms: float
    int8_over_bf16: float
    ratio_least: float
    ratio_most: float


def losses(subject: Subject, decoder: Decoder, documents: list[list[int]], kv: str) -> Tensor:
    """Summed negative log-likelihood of each document, fp64 [documents]."""
    sums = []
    for ids in documents:
        tokens = torch.tensor(ids)
        cache = KvCache(subject.spec, len(ids), DTYPES[kv])
        logits = decoder.forward(Batch.of(tokens, cache, all_logits=True))  # [T, V]
        log_probs = logits[:-1].double().log_softmax(-1)
        sums.append(-log_probs.gather(1, tokens[1:, None]).sum())
    return torch.stack(sums)


def perplexities(model: Path, heldout: Path, max_tokens: int) -> list[PerplexityRow]:
    subject = Subject(model)
    decoder = subject.decoder(Variant(None, None))
    documents = [
        subject.token_ids(json.loads(line))[:max_tokens]
        for file in sorted(heldout.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    documents = [ids for ids in documents if len(ids) > 1]
    counts = torch.tensor([len(ids) - 1 for ids in documents], dtype=torch.float64)
    base = losses(subject, decoder, documents, "fp32")
    rows = []
    for kv in DTYPES:
        found = base if kv == "fp32" else losses(subject, decoder, documents, kv)
        difference = found - base  # [documents]
        mean = float(difference.sum() / counts.sum())
        spread = (difference - counts * mean).pow(2).sum().sqrt() / counts.sum()
        change = math.expm1(mean)
        perplexity = math.exp(float(found.sum() / counts.sum()))
        rows.append(PerplexityRow(kv, perplexity, change, float(spread) * (1 + change)))
        print(
            f"| {kv} | {perplexity:.4f} | {change:+.3%} ± {rows[-1].change_stderr:.3%} |",
            flush=True,
        )
    return rows


def attention(name: str, length: int) -> AttentionRow:
    heads, kv_heads, size = SHAPES[name]
    stored = torch.randn(2, kv_heads, length, size)
    queries = torch.randn(1, heads, size).bfloat16()
    keys, values = stored.bfloat16()
    numbers, scales = quantize_heads(stored)
    kept = [Int8Heads(numbers[i], scales[i]) for i in range(2)]
    ways = {
        "bf16": lambda: attend_kept(queries, keys, values),
        "int8": lambda: attend_kept(queries, *kept),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way in random.Random(number).sample(list(ways), 2):
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < ROUND_S:
                ways[way]()
                count += 1
            seconds[way].append((time.perf_counter() - begin) / count)
    bf16, int8 = (seconds[way][1:] for way in ways)  # the first warms up
    ratios = [i / b for i, b in zip(int8, bf16, strict=True)]
    medians = (statistics.median(times) * 1e3 for times in (bf16, int8))
    return AttentionRow(
        *(name, length, *medians, statistics.median(ratios), min(ratios), max(ratios))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "moecli" / "demo")
    parser.add_argument("--heldout", type=Path, default=ROOT / "tests" / "fixtures" / "heldout")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a document")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("| heads | tokens | bf16, ms | int8, ms | int8 / bf16 |")
    print("|---|---|---|---|---|")
    times = [attention(name, length) for name in SHAPES for length in LENGTHS]
    for row in times:
        print(
            f"| {row.shape} | {row.tokens} | {row.bf16_ms:.2f} | {row.int8_ms:.2f} "
            f"| {row.int8_over_bf16:.2f} ({row.ratio_least:.2f} to {row.ratio_most:.2f}) |"
        )
    torch.set_num_threads(threads)
    print("| KV cache | perplexity | against fp32 |")
    print("|---|---|---|", flush=True)
    rows = perplexities(options.model, options.heldout, options.max_tokens)
    if options.json is not None:
        content = {"perplexity": [asdict(r) for r in rows], "attention": [asdict(r) for r in times]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
