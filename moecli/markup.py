"""Knows what of an answer is reasoning and what is for its reader, by the markup in the text.

Knows no tokens. Tool calls are for the reader, as the model wrote them. docs/answers.md says why.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moecli.stopping import doubtful

Kind = Literal["reasoning", "text"]
Fields = dict[str, Any]  # of an assistant's message, as its chat template wants them


@dataclass(frozen=True)
class Piece:
    """Some characters of an answer; never none."""

    kind: Kind
    text: str


class Splitter(Protocol):
    """Divides one answer as it comes."""

    def feed(self, text: str) -> list[Piece]:
        """What has become certain with `text`."""

    def finish(self) -> list[Piece]:
        """What was held back, once no more text can come."""


class Markup(Protocol):
    """How the answers of a model are written."""

    def splitter(self, prompt: str) -> Splitter:
        """For the answer to a prompt that ends like this."""

    def fields(self, answer: str) -> Fields:
        """What a chat template is told of a former answer, beside its role."""


class Plain:
    """An answer is text, all of it."""

    def splitter(self, prompt: str) -> Splitter:
        return _PlainSplitter()

    def fields(self, answer: str) -> Fields:
        return {"content": answer}


class _PlainSplitter:
    def feed(self, text: str) -> list[Piece]:
        return [Piece("text", text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Thinking:
    """Reasoning first, `<think>...</think>`, which the prompt may have begun or left out.

    Chat templates of such models take it as part of the content, and decide themselves how long
    it stays in a conversation.
    """

    BEGIN, END = "<think>", "</think>"

    def splitter(self, prompt: str) -> Splitter:
        return _ThinkingSplitter(prompt.rstrip().endswith(self.BEGIN))

    def fields(self, answer: str) -> Fields:
        return {"content": answer}


class _ThinkingSplitter:
    def __init__(self, begun: bool) -> None:
        self._kind: Kind | None = "reasoning" if begun else None  # None: not yet known
        self._trim = begun  # whether white space is still to be left out
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        if self._kind is None:
            begin = self._held.lstrip()
            if Thinking.BEGIN.startswith(begin[: len(Thinking.BEGIN)]):
                if len(begin) < len(Thinking.BEGIN):
                    return []
                self._held = begin[len(Thinking.BEGIN) :]
                self._kind, self._trim = "reasoning", True
            else:
                self._kind = "text"
        if self._kind == "text":
            return self._take(len(self._held))
        thoughts, end, rest = self._held.partition(Thinking.END)
        if not end:
            certain = thoughts[: len(thoughts) - doubtful(thoughts, (Thinking.END,))]
            return self._take(len(certain.rstrip()))  # white space before the end is left out
        self._held = thoughts.rstrip()
        found = self._take(len(self._held))
        self._kind, self._trim, self._held = "text", True, rest
        return found + self._take(len(rest))

    def finish(self) -> list[Piece]:
        self._kind = self._kind or "text"
        return self._take(len(self._held))

    def _take(self, length: int) -> list[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        assert self._kind is not None, "text of no kind"
        return [Piece(self._kind, text)] if text else []


class Harmony:
    """The messages of gpt-oss: `<|start|>role to=whom<|channel|>name<|message|>...<|end|>`.

    The channel `analysis` is reasoning. A message to somebody is a call of a tool; its header is
    part of the text, because it says of which. The prompt ends after the first role.
    """

    def splitter(self, prompt: str) -> Splitter:
        return _HarmonySplitter()

    def fields(self, answer: str) -> Fields:
        """`content`, `thinking` and `tool_calls`, as the template of gpt-oss wants them."""
        splitter = _HarmonySplitter()
        pieces = splitter.feed(answer) + splitter.finish()
        thinking = joined(pieces, "reasoning")
        thought = {"thinking": thinking} if thinking else {}
        if splitter.calls:
            # The template takes one call, and beside it content or thinking, not both.
            return {"content": "", **thought, "tool_calls": splitter.calls[-1:]}
        return {"content": joined(pieces, "text"), **thought}


_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ENDS = (_END, "<|return|>", "<|call|>")
_MARKS = (_START, _CHANNEL, _MESSAGE, "<|constrain|>", *_ENDS)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))


# What may stand in a header before its channel: a role, unless the prompt gave it, and to whom.
_TO = r"(\s+(t(o(=\S*\s*)?)?)?)?"
_AFTER_ROLE, _FROM_ROLE = re.compile(_TO), re.compile(r"\w*" + _TO)


class _HarmonySplitter:
    def __init__(self) -> None:
        self.calls: list[Fields] = []  # of tools
        self._held = ""
        self._header: str | None = ""  # of the message that begins; None: in a body
        self._role = "assistant"  # that the prompt gave; later headers name their own
        self._kind: Kind = "text"
        self._called: str | None = None  # the tool that this message calls
        self._body = ""
        self._seen: set[Kind] = set()
        self._parted = True  # whether this message is apart from others of its kind

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while mark := _MARK.search(self._held):
            before, self._held = self._held[: mark.start()], self._held[mark.end() :]
            pieces += self._characters(before) + self._mark(mark[0])
        certain = len(self._held) - doubtful(self._held, _MARKS)
        before, self._held = self._held[:certain], self._held[certain:]
        return pieces + self._characters(before)

    def finish(self) -> list[Piece]:
        pieces = self._characters(self._held)
        self._held = ""
        if self._header and self._role and _CHANNEL not in self._header:
            pieces += self._show(self._header)  # short text, and no header after all
        self._end_message()
        return pieces

    def _characters(self, text: str) -> list[Piece]:
        if self._header is None:
            self._body += text
            return self._show(text)
        self._header += text
        expected = _AFTER_ROLE if self._role else _FROM_ROLE
        if _CHANNEL in self._header or expected.fullmatch(self._header):
            return []
        plain, self._header = self._header, None  # a model may leave the format out altogether
        return self._show(plain)

    def _mark(self, mark: str) -> list[Piece]:
        if mark == _START:
            self._end_message()
            self._header, self._role = "", ""
        elif mark in _ENDS:
            self._end_message()
        elif self._header is None:
            return self._characters(mark)
        elif mark == _MESSAGE:
            return self._begin_body(self._header)
        else:
            self._header += mark
        return []

    def _begin_body(self, header: str) -> list[Piece]:
        channel = re.search(re.escape(_CHANNEL) + r"\s*(\w+)", header)
        recipient = re.search(r"\bto=([^\s<]+)", header)
        self._header, self._parted = None, False
        if recipient is None:
            self._kind = "reasoning" if channel and channel[1] == "analysis" else "text"
            return []
        self._kind, self._called = "text", recipient[1].removeprefix("functions.")
        return self._show(f"{_START}{self._role}{header}{_MESSAGE}")

    def _end_message(self) -> None:
        if self._called is not None:
            call = {"name": self._called, "arguments": _arguments(self._body)}
            self.calls.append({"type": "function", "function": call})
        self._header, self._called, self._kind, self._body = None, None, "text", ""

    def _show(self, text: str) -> list[Piece]:
        if not text:
            return []
        apart = "" if self._parted or self._kind not in self._seen else "\n\n"
        self._parted = True
        self._seen.add(self._kind)
        return [Piece(self._kind, apart + text)]


def _arguments(text: str) -> Any:
    """The template writes arguments as JSON itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def joined(pieces: list[Piece], kind: Kind) -> str:
    """All text of one kind."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def markup_of(knows: Callable[[str], bool], template: str) -> Markup:
    """That of a model, from which tokens it `knows` by name and from its chat template."""
    if knows(_CHANNEL) and knows(_MESSAGE):
        return Harmony()
    if knows(Thinking.END) or Thinking.END in template:
        return Thinking()
    return Plain()
