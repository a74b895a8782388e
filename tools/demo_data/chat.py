"""Knows what a training document is (messages, or plain text), and how people mistype."""

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    domain: str
    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    text: str = ""

    def as_dict(self) -> dict:
        if self.text:
            return {"domain": self.domain, "text": self.text}
        turns = [{"role": r, "content": c} for r, c in self.messages]
        return {"domain": self.domain, "messages": turns}


SYSTEM = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the user's questions clearly.",
    "You are a small demo model inside moecli.",
    "You are a kind and patient helper.",
    "Keep your answers short.",
    "You are a careful assistant. Say so when you do not know.",
    "Be friendly and clear.",
]


def sloppy(text: str, rng: random.Random) -> str:
    """The same request as a hurried person types it: no capital, no apostrophes, a slip."""
    if "\n" in text:
        return text
    text = text.replace("'", "")
    if rng.random() < 0.7 and not text.startswith("I "):
        text = text[:1].lower() + text[1:]
    if rng.random() < 0.7:
        text = text.rstrip(".?!")
    words = text.split(" ")
    plain = [i for i, w in enumerate(words) if re.fullmatch(r"[a-z]{5,}", w)]
    if plain and rng.random() < 0.4:
        i = rng.choice(plain)
        w = words[i]
        j = rng.randrange(1, len(w) - 2)
        words[i] = w[:j] + w[j + 1] + w[j] + w[j + 2 :]
    return " ".join(words)


def user(text: str, rng: random.Random, slop: float = 0.15) -> tuple[str, str]:
    return ("user", sloppy(text, rng) if rng.random() < slop else text)


def with_system(messages: list, rng: random.Random, share: float = 0.15) -> tuple:
    if messages[0][0] != "system" and rng.random() < share:
        messages = [("system", rng.choice(SYSTEM)), *messages]
    return tuple(messages)
