"""Knows the shares of the domains and how a shard of documents is drawn from a seed."""

import random
from pathlib import Path

from demo_data import arithmetic, code, facts, mixed, prose, recall, smalltalk, stories
from demo_data.chat import Document

# Shares of the tokens. Recall is strong from the start: copying must form early.
SHARES = {
    "stories": 0.21,
    "arithmetic": 0.20,
    "prose": 0.12,
    "facts": 0.14,
    "recall": 0.09,
    "smalltalk": 0.08,
    "code": 0.07,
    "mixed": 0.09,
}
# Early on, copying gets a share of its own: names in stories and answers depend on it.
COPYING = 0.2


def document(domain: str, rng: random.Random, sources: Path, long: bool) -> Document:
    if domain == "prose":
        return prose.make(rng, sources, long)
    if domain == "facts":
        return facts.make(rng, sources)
    if domain == "mixed":
        return mixed.make(rng, sources)
    maker = {
        "stories": stories,
        "arithmetic": arithmetic,
        "recall": recall,
        "smalltalk": smalltalk,
        "code": code,
    }
    return maker[domain].make(rng)


def draw(
    rng: random.Random, sources: Path, size_of, target: int, long: bool, copying: float = 0.0
) -> list[Document]:
    """Documents of target tokens; size_of tells a document's tokens. Domains keep their shares
    of what copying leaves.
    """
    taken, total, documents = dict.fromkeys(SHARES, 0), 0, []
    copied = 0
    while total + copied < target:
        if copied < copying * (total + copied):
            documents.append(recall.copying(rng))
            copied += size_of(documents[-1])
            continue
        domain = max(SHARES, key=lambda d: SHARES[d] * (total + 1) - taken[d])
        if rng.random() < 0.3:
            domain = rng.choices(list(SHARES), list(SHARES.values()))[0]
        item = document(domain, rng, sources, long)
        size = size_of(item)
        documents.append(item)
        taken[domain] += size
        total += size
    rng.shuffle(documents)
    return documents
