"""Knows what has been said in a conversation and how it is kept in a file; knows no terminal."""

import json
import os
from pathlib import Path
from typing import Any

from moecli.errors import MoecliError

FORMAT = "moecli-chat"
VERSION = 1
_MAX_NBYTES = 64 << 20

Message = dict[str, str]


class Conversation:
    """A system prompt and turns that alternate: user, assistant, user, ..."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What a chat template takes."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    @property
    def num_answers(self) -> int:
        return sum(turn["role"] == "assistant" for turn in self.turns)

    @property
    def _is_open(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and self.turns[-1]["role"] == "user"

    def ask(self, text: str) -> None:
        assert not self._is_open, "it is not the user's turn"
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        assert self._is_open, "nothing was asked"
        self.turns.append({"role": "assistant", "content": text})

    def take_back_question(self) -> str:
        """Remove the question that has no answer yet, and return it."""
        assert self._is_open, "every question has its answer"
        return self.turns.pop()["content"]

    def take_back_answer(self) -> str:
        """Remove the last answer and return it. Raises MoecliError when there is none."""
        if not self.turns:
            raise MoecliError("there is no answer to write anew")
        assert not self._is_open, "the last question has no answer"
        return self.turns.pop()["content"]

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns.clear()

    def save(self, path: Path, model: str) -> None:
        """Write a file that `load` reads; whole or not at all.

        Raises MoecliError rather than overwrite a file that is no saved chat.
        """
        if path.exists():
            try:
                Conversation.load(path)
            except MoecliError as error:
                raise MoecliError(
                    f"`{path}` exists and is not a saved chat", "give another name"
                ) from error
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "system": self.system,
            "turns": self.turns,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise MoecliError(f"cannot write `{path}`: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what `save` wrote. Raises MoecliError for any other file."""
        content = _read(path)
        version = content.get("version")
        if content.get("format") != FORMAT:
            raise _not_a_chat(path)
        if version != VERSION:
            raise MoecliError(
                f"`{path}` has version {version!r} of the format; this moecli reads {VERSION}"
            )
        conversation = cls(content.get("system"))
        turns = content.get("turns")
        if not _is_text(conversation.system or "") or not isinstance(turns, list):
            raise _not_a_chat(path)
        for index, turn in enumerate(turns):
            role = ("user", "assistant")[index % 2]
            if not _is_message(turn) or turn["role"] != role:
                raise _not_a_chat(path)
            conversation.turns.append({"role": role, "content": turn["content"]})
        if len(turns) % 2:
            raise _not_a_chat(path)
        return conversation


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and set(turn) == {"role", "content"} and _is_text(turn["content"])


def _is_text(value: Any) -> bool:
    """A string that UTF-8 can write: JSON can carry halves of surrogate pairs."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_NBYTES or not path.is_file():
            raise _not_a_chat(path)
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise MoecliError(f"there is no file `{path}`") from error
    except OSError as error:
        raise MoecliError(f"cannot read `{path}`: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _not_a_chat(path) from error
    if not isinstance(content, dict):
        raise _not_a_chat(path)
    return content


def _not_a_chat(path: Path) -> MoecliError:
    return MoecliError(f"`{path}` is not a saved chat", "`/save FILE` writes one")
