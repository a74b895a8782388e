"""Knows real prose: passages of Jane Austen's novels; every 16th chapter is held out."""

import random
import re
from functools import lru_cache
from pathlib import Path

from demo_data.chat import Document
from demo_data.sources import novels

HELD_OUT_EVERY = 16


@lru_cache(maxsize=1)
def chapters(folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out chapters, each a list of paragraphs."""
    train, held_out = [], []
    for lines in novels(folder).values():
        text = "\n".join(lines)
        parts = re.split(r"\n\s*chapter [0-9ivxlc]+\.?\s*\n", text, flags=re.IGNORECASE)[1:]
        for i, part in enumerate(parts):
            paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", part)]
            paragraphs = [plain(p) for p in paragraphs if len(p) > 20 and not p.isupper()]
            (held_out if i % HELD_OUT_EVERY == 9 else train).append(paragraphs)
    return train, held_out


def plain(text: str) -> str:
    for old, new in (
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2019", "'"),
        ("\u2018", "'"),
        ("\u2014", "--"),
    ):
        text = text.replace(old, new)
    return text.replace("_", "")


def passage(pool: list[list[str]], rng: random.Random, num_chars: int) -> str:
    chapter = rng.choices(pool, [len(c) for c in pool])[0]
    start, taken, size = rng.randrange(len(chapter)), [], 0
    for paragraph in chapter[start:]:
        taken.append(paragraph)
        size += len(paragraph)
        if size >= num_chars:
            break
    return "\n\n".join(taken)[: num_chars * 2].strip()


def make(rng: random.Random, folder: Path, long: bool) -> Document:
    num_chars = rng.choice([400, 800, 1200]) if not long else rng.choice([500, 1000, 2000, 3500])
    return Document("prose", text=passage(chapters(folder)[0], rng, num_chars))


def held_out(folder: Path, rng: random.Random, count: int) -> list[Document]:
    pool = chapters(folder)[1]
    return [Document("prose", text=passage(pool, rng, 1000)) for _ in range(count)]
