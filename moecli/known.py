"""Knows released models by the names that people type: their config.json is here, no weights are.

The files under `released/` hold what the config.json of each repository says, less what neither a
plan nor a reader asks for (token numbers, dropout, the version that wrote it). A test builds each
with transformers' own class and compares the number of parameters.
"""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Known:
    """A built-in spec. `guessed`: what nobody has published, where that is so."""

    name: str
    title: str
    repo_id: str | None  # of the weights, in the hub; None: they were never released
    alias: str | None = None
    guessed: str | None = None

    @property
    def label(self) -> str:
        """The title, marked where it is not of a released model."""
        return f"{self.title} (announced figures)" if self.guessed else self.title

    def config(self) -> dict[str, Any]:
        path = Path(__file__).parent / "released" / f"{self.name}.json"
        return json.loads(path.read_bytes())


# Announced in April 2025 as 288 billion active parameters, 16 experts, nearly two trillion in all.
# Sixteen experts of which one is chosen leave (total - active) / 15 for one expert of all layers;
# the rest follows from Llama 4's shape with the widths of the largest Llama 3.1.
_BEHEMOTH = (
    "announced: 288B active, about 2T in all, 16 experts; guessed so that these come out: 96 "
    "layers, all with experts, hidden size 16384, 128 heads, experts of 24064, a shared one; no "
    "vision tower"
)

SPECS = (
    Known(
        *("llama4-scout", "Llama 4 Scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "scout"),
    ),
    Known(
        *("llama4-maverick", "Llama 4 Maverick"),
        *("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "maverick"),
    ),
    Known("llama4-behemoth", "Llama 4 Behemoth", None, "behemoth", _BEHEMOTH),
    Known("mixtral-8x7b", "Mixtral 8x7B", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    Known("qwen3-30b-a3b", "Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"),
    Known("qwen3-235b-a22b", "Qwen3-235B-A22B", "Qwen/Qwen3-235B-A22B"),
    Known("deepseek-v3", "DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
    Known("gpt-oss-20b", "gpt-oss-20b", "openai/gpt-oss-20b"),
    Known("gpt-oss-120b", "gpt-oss-120b", "openai/gpt-oss-120b"),
    Known("glm-4.5-air", "GLM-4.5-Air", "zai-org/GLM-4.5-Air"),
    Known("llama3.1-8b", "Llama 3.1 8B", "meta-llama/Llama-3.1-8B-Instruct"),
    Known("llama3.1-70b", "Llama 3.1 70B", "meta-llama/Llama-3.1-70B-Instruct"),
    Known("llama3.1-405b", "Llama 3.1 405B", "meta-llama/Llama-3.1-405B-Instruct"),
)


def find(name: str) -> Known | None:
    """The spec of this name, however it is hyphenated, or by the repository of its weights."""
    asked = _plain(name)
    for known in SPECS:
        names = [_plain(each) for each in (known.name, known.alias) if each]
        if asked in names or (known.repo_id and name.lower() == known.repo_id.lower()):
            return known
    return None


def close_to(name: str) -> list[str]:
    """Names that may have been meant, the best first."""
    plain = {_plain(known.name): known.name for known in SPECS}
    return [plain[match] for match in difflib.get_close_matches(_plain(name), plain, 3, 0.6)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
