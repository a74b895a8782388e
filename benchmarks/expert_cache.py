"""Hit rates of the expert cache on the embedded model, by share resident and by reading ahead.

    python benchmarks/expert_cache.py MODEL_DIR [--json FILE]

MODEL_DIR is what `moecli quantize demo` wrote. The first question of held-out conversations is
answered greedily, one session each, over one cache. No times are taken: the model is so small that
they would say nothing about any other.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.models.decoder import Lookahead

ROOT = Path(__file__).resolve().parent.parent
CTX = 1024
SHARES = (0.05, 0.1, 0.25, 0.5)
GUESSES = (0, 1, 2)
QUESTIONS_A_DOMAIN = 2
MAX_TOKENS = 100


@dataclass(frozen=True)
class Row:
    """One run; a hit found the expert in memory or on its way there."""

    share_resident: float
    guesses: int  # experts read ahead a token and layer
    tokens: int
    hit_rate: float
    nbytes_read: int
    ahead_reads: int
    ahead_used: float  # share of what was read ahead that was asked for in time


def questions(heldout: Path) -> Iterator[str]:
    for file in sorted(heldout.glob("*.jsonl")):
        documents = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        asked = (
            message["content"]
            for document in documents
            for message in document.get("messages", ())[:1]
            if message["role"] == "user"
        )
        for _, question in zip(range(QUESTIONS_A_DOMAIN), asked, strict=False):
            yield question


def measure(model: Path, share: float, guesses: int, asked: list[str]) -> Row:
    with Engine.open(model, EngineConfig(ctx=CTX)) as engine:
        plan = engine.plan
    fixed = plan.ram_nbytes - plan.host_arena_nbytes
    budget = fixed + int(share * plan.total_experts) * plan.slot_nbytes
    tokens = 0
    with Engine.open(model, EngineConfig(ctx=CTX, ram_nbytes=budget)) as engine:
        for layer, following in pairwise(engine.decoder.layers):
            layer.lookahead = Lookahead(following, guesses, range(1, CTX + 1)) if guesses else None
        for question in asked:
            session = engine.new_session()
            prompt = engine.encode_chat([{"role": "user", "content": question}])
            sampling = SamplingConfig(temperature=0, max_tokens=MAX_TOKENS)
            for _ in engine.generate(session, prompt, sampling):
                pass
            tokens += len(session.tokens)
        stats = engine.expert_stats()
    used = stats.prefetch_hits / stats.prefetch_reads if stats.prefetch_reads else 0.0
    rate = stats.hit_rate or 0.0
    return Row(share, guesses, tokens, rate, stats.disk_nbytes, stats.prefetch_reads, used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--heldout", type=Path, default=ROOT / "tests" / "fixtures" / "heldout")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    asked = list(questions(options.heldout))
    print("| resident | read ahead a layer | hit rate | MB read | of that read ahead, used |")
    print("|---|---|---|---|---|")
    rows = []
    for share in SHARES:
        for guesses in GUESSES:
            row = measure(options.model, share, guesses, asked)
            rows.append(row)
            print(
                f"| {share:.0%} | {guesses} | {row.hit_rate:.1%} | {row.nbytes_read / 1e6:.1f} "
                f"| {row.ahead_used:.0%} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
