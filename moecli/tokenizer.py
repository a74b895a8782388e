"""Knows text as tokens and conversations as prompts, by a checkpoint's own files; no model.

Uses `tokenizers` and a sandboxed jinja2 directly: importing transformers takes seconds.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from moecli.chat_template import ChatTemplate
from moecli.errors import MoecliError
from moecli.markup import markup_of

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_DAMAGED_HINT = "download the file again"
_REPLACEMENT = "\ufffd"
_UNFINISHED = 3  # bytes, hence at most tokens, of a character that still lacks its last byte
_LONGEST_WINDOW = 64  # tokens decoded again for each new one, inside long runs that are no text


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(
        self,
        backend: Backend,
        template: ChatTemplate | None,
        eos_ids: frozenset[int],
        named: Iterable[str],
    ) -> None:
        self.backend = backend
        self.template = template
        self.eos_ids = eos_ids
        self._added = backend.get_added_tokens_decoder()
        # Tokens that end an answer, or begin and pad a text, are no part of it. Other special
        # tokens are: they say what is reasoning and what calls a tool.
        self.silent_ids = eos_ids | {backend.token_to_id(name) for name in named}
        self.markup = markup_of(
            lambda name: backend.token_to_id(name) is not None,
            "" if template is None else template.source,
        )

    @classmethod
    def open(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json and what lies beside it.

        Raises MoecliError if it is missing or damaged; a missing chat template is no error before
        `render` needs it.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise MoecliError(
                f"`{directory}` has no tokenizer.json",
                "download the whole repository; moecli reads no other tokenizer files",
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise MoecliError(f"`{path}` cannot be read: {error}", _DAMAGED_HINT) from error
        config = _read_json(directory / "tokenizer_config.json")
        special = _special_tokens(_read_json(directory / "special_tokens_map.json") | config)
        source = _template_source(directory, config)
        template = None if source is None else ChatTemplate(source, special)
        return cls(backend, template, _eos_ids(directory, backend, special), special.values())

    @property
    def vocab_size(self) -> int:
        """One past the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text; with `special` also those the model wants around one, such as BOS.

        Names of special tokens inside the text become these tokens either way: a rendered chat
        consists of them.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def encode_after(self, held: Sequence[int], text: str) -> list[int]:
        """Tokens of a text, with as many as can be of those `held` where they say the same.

        An answer would often be divided into other tokens when encoded anew. Where the text goes
        on otherwise, only what lies before an added token is kept: there any text is divided.
        """
        same = self._num_same(held, text)
        if same < len(held):
            same = next((i for i in range(same - 1, 0, -1) if self.is_added(held[i])), 0)
        said = self.decode(held[:same], skip_special=False)
        assert text.startswith(said), "what is held is the beginning of the text"
        return [*held[:same], *self.encode(text[len(said) :])]

    def _num_same(self, held: Sequence[int], text: str) -> int:
        """How many of the tokens held the text begins with, fewer where some are no characters."""
        if text.startswith(self.decode(held, skip_special=False)):
            return len(held)
        low, high = 0, len(held) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if text.startswith(self.decode(held[:middle], skip_special=False)):
                low = middle
            else:
                high = middle - 1
        return low

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def render(
        self,
        messages: Iterable[dict[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation, each message with `role` and `content`, as the prompt of the model.

        Raises MoecliError if there is no template, or if it refuses the messages.
        """
        if self.template is None:
            raise MoecliError(
                "this model has no chat template: it continues text but cannot chat",
                "`moecli run --raw` takes the prompt as it is",
            )
        return self.template.render(list(messages), add_generation_prompt, **variables)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template repeats a system message; some refuse or ignore it."""
        mark = "a system message"
        messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a question"}]
        try:
            return mark in self.render(messages)
        except MoecliError:
            return False

    def detokenizer(self) -> "Detokenizer":
        return Detokenizer(self)

    def is_added(self, token: int) -> bool:
        """Whether it is found whole in any text, which is divided there before all else."""
        return token in self._added

    def special_text(self, token: int) -> str | None:
        """The name of a special token; None for any other."""
        added = self._added.get(token)
        return added.content if added is not None and added.special else None


class Detokenizer:
    """Text of tokens that arrive one by one, in whole characters, without the silent tokens.

    What may still become a character is held back; bytes that cannot any more become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # some tokens of context, then those held back
        self._context = 0

    def add(self, token: int) -> str:
        """Characters that have become certain, perhaps none."""
        if token in self._tokenizer.silent_ids:
            return self.finish()
        if (name := self._tokenizer.special_text(token)) is not None:
            return self.finish() + name
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(_REPLACEMENT):
            return self._release(len(self._ids), text)
        certain = len(self._ids) - _UNFINISHED
        return self._release(certain) if certain > self._context else ""

    def finish(self) -> str:
        """What is still held back, as it stands."""
        held = len(self._ids) - self._context
        return self._release(len(self._ids)) if held else ""

    def _release(self, count: int, text: str | None = None) -> str:
        """The text of the tokens before `count`."""
        known = self._tokenizer.decode(self._ids[: self._context])
        text = self._tokenizer.decode(self._ids[:count]) if text is None else text
        # The newest tokens stay as context, because decoders treat a first token differently. How
        # many U+FFFD a broken sequence makes depends on where it begins: it is not cut.
        if count == len(self._ids) or self._context > _LONGEST_WINDOW:
            self._ids, self._context = self._ids[self._context :], count - self._context
        else:
            self._context = count
        return text[len(known) :]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoecliError(f"`{path}` cannot be read: {error}", _DAMAGED_HINT) from error
    if not isinstance(value, dict):
        raise MoecliError(f"`{path}` holds no JSON object", _DAMAGED_HINT)
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; each is stored as its text or as an object around it."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template, from the newest place to the oldest; None: the model has none."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MoecliError(f"`{path}` cannot be read: {error}", _DAMAGED_HINT) from error
    value = config.get("chat_template")
    if value is None:
        value = _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return value if isinstance(value, str) else None


def _eos_ids(directory: Path, backend: Backend, special: dict[str, str]) -> frozenset[int]:
    """Tokens that end an answer: generation_config.json, else config.json, else the tokenizer."""
    config = _read_json(directory / "config.json")
    text_config = config.get("text_config")
    sources = [_read_json(directory / "generation_config.json"), config]
    if isinstance(text_config, dict):
        sources.append(text_config)
    for source in sources:
        ids = source.get("eos_token_id")
        if isinstance(ids, int):
            return frozenset([ids])
        if isinstance(ids, list) and ids:
            return frozenset(ids)
    token = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return frozenset() if token is None else frozenset([token])
