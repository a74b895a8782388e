"""Knows longer conversations that change the subject and return to what was said at the start."""

import random
from pathlib import Path

from demo_data import arithmetic, code, facts, recall, smalltalk, stories
from demo_data.chat import Document, with_system


def turn(rng: random.Random, sources: Path) -> list:
    """The turns of one short document of any chat domain, without its system prompt."""
    kind = rng.choices(
        ["arithmetic", "facts", "talk", "filled", "story", "code", "recall"],
        [20, 25, 25, 10, 10, 5, 8],
    )[0]
    if kind == "arithmetic":
        return arithmetic.question(rng)
    if kind == "facts":
        pick = rng.choices(
            [facts.capital, facts.element, facts.everyday, facts.calendar], [5, 2, 4, 1]
        )[0]
        return pick(rng, sources)
    if kind == "talk":
        return smalltalk.talk(rng)
    if kind == "filled":
        return smalltalk.filled(rng, rng.choice([smalltalk.DECLINE, smalltalk.CHAT]))
    if kind == "recall":  # nothing about the user: that would contradict what was said before
        return rng.choice([recall.repeat, recall.list_question, recall.owners, recall.where])(rng)
    document = {"story": stories, "code": code}[kind].make(rng)
    return [m for m in document.messages if m[0] != "system"][:2]


def make(rng: random.Random, sources: Path) -> Document:
    messages: list = []
    said = recall.about_me(rng) if rng.random() < 0.7 else []
    half = (
        next((i for i, m in enumerate(said) if m[1].endswith("?") and m[0] == "user"), len(said))
        // 2
        * 2
    )
    messages += said[:half]
    for _ in range(rng.randint(1, 6)):
        messages += turn(rng, sources)
    messages += said[half:]
    return Document("mixed", with_system(messages, rng))
