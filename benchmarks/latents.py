"""How fast attention over latents is in the latents' space, beside keys and values expanded.

    python benchmarks/latents.py [--threads N] [--json FILE]

Heads of DeepSeek-V3, one layer, random numbers, a cache in bf16. Four ways in turns, in each round
in another order: absorbed; expanded anew, as a cache of latents makes it necessary without that;
attention alone over keys and values that a larger cache keeps expanded; and a product of matrices
as fast as this machine does it, which is the ceiling. Prints a Markdown table; `--json` writes the
same figures. The largest case takes some 4 GiB.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moecli.models.attention import attend
from moecli.models.config import LatentSpec
from moecli.models.latent import LatentHeads
from moecli.models.latent_sizes import most_absorbed

HEADS = 128
DEEPSEEK_V3 = LatentSpec(512, 1536, nope_size=128, rope_size=64, value_size=128, scale=0.135)
CASES = ((1, 4096), (1, 16384), (64, 4096), (128, 4096), (192, 4096), (512, 4096))  # new, seen
ROUNDS = 5
_SQUARE = 2048  # rows and columns of the ceiling's matrices


@dataclass(frozen=True)
class Row:
    """Medians of milliseconds, and of ratios within a round with the least and the most."""

    tokens: int
    length: int
    taken: str  # the form that `LatentHeads.attend` takes
    absorbed_ms: float
    expanded_ms: float
    kept_expanded_ms: float
    absorbed_share: float  # of the multiplications a second of the ceiling
    expanded_over_absorbed: tuple[float, float, float]
    kept_expanded_over_absorbed: tuple[float, float, float]
    latent_nbytes: int  # of the cache
    kept_expanded_nbytes: int


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def measure(count: int, length: int) -> Row:
    latent = DEEPSEEK_V3
    kv_b = torch.randn(HEADS, latent.nope_size + latent.value_size, latent.rank) * 0.04
    heads = LatentHeads(0, "interleaved", latent, kv_b)
    queries = torch.randn(count, HEADS, latent.head_size)
    kept = torch.randn(length, latent.kept_size).bfloat16()
    keys = torch.randn(HEADS, length, latent.padded_size, dtype=torch.bfloat16)
    values = torch.randn(HEADS, length, latent.padded_size, dtype=torch.bfloat16)
    square = torch.randn(_SQUARE, _SQUARE)
    ways: dict[str, Callable[[], object]] = {
        "absorbed": lambda: heads.absorbed(queries, kept),
        "expanded": lambda: heads.expanded(queries, kept),
        "kept": lambda: attend(queries.bfloat16(), keys, values),
        "ceiling": lambda: square @ square,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name in random.sample(list(ways), len(ways)):
            taken = seconds(ways[name])
            if number:  # the first round warms up
                found[name].append(taken)
    pairs = zip(found["expanded"], found["absorbed"], strict=True)
    kept_pairs = zip(found["kept"], found["absorbed"], strict=True)
    products = HEADS * count * (latent.kept_size + latent.rank) * length
    products += HEADS * count * latent.rank * (latent.nope_size + latent.value_size)
    ceilings = zip(found["ceiling"], found["absorbed"], strict=True)
    shares = [products / absorbed / (_SQUARE**3 / ceiling) for ceiling, absorbed in ceilings]
    return Row(
        *(count, length),
        "absorbed" if count <= most_absorbed(latent, length) else "expanded",
        *(1e3 * statistics.median(found[name]) for name in ("absorbed", "expanded", "kept")),
        statistics.median(shares),
        spread([expanded / absorbed for expanded, absorbed in pairs]),
        spread([expanded / absorbed for expanded, absorbed in kept_pairs]),
        *(kept.nbytes, 2 * HEADS * length * (latent.head_size + latent.value_size)),
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| new tokens | seen | taken | absorbed, ms | expanded anew, ms | kept expanded, ms | "
        "expanded / absorbed | kept expanded / absorbed | share of the ceiling |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = (row.expanded_over_absorbed, row.kept_expanded_over_absorbed)
        anew, kept = (f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in ratios)
        lines.append(
            f"| {row.tokens} | {row.length} | {row.taken} | {row.absorbed_ms:.1f} | "
            f"{row.expanded_ms:.1f} | {row.kept_expanded_ms:.1f} | {anew} | {kept} | "
            f"{row.absorbed_share:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [measure(*case) for case in CASES]
    print(table(rows))
    if options.json is not None:
        result = {"threads": options.threads, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
