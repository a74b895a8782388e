"""Knows what has been said in a conversation and how it is kept in a file; knows no terminal."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli.errors import MoecliError

if TYPE_CHECKING:
    from moecli.vision.picture import Picture

FORMAT = "moecli-chat"
VERSIONS = (1, 2)  # 2 where pictures were shown
_MAX_NBYTES = 64 << 20

Message = dict[str, Any]  # `role`, `content`, and of some `images`: the pictures shown with it


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
    def pictures(self) -> "list[Picture]":
        """All that were shown, in order."""
        return [picture for turn in self.turns for picture in turn.get("images", ())]

    @property
    def num_answers(self) -> int:
        return sum(turn["role"] == "assistant" for turn in self.turns)

    @property
    def _is_open(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.turns) and self.turns[-1]["role"] == "user"

    def ask(self, text: str, pictures: "Sequence[Picture]" = ()) -> None:
        assert not self._is_open, "it is not the user's turn"
        shown = {"images": list(pictures)} if pictures else {}
        self.turns.append({"role": "user", "content": text, **shown})

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
        """Write a file that `load` reads; whole or not at all. Of pictures it names the files.

        Raises MoecliError rather than overwrite a file that is no saved chat.
        """
        if path.exists():
            try:
                _parse(path)
            except MoecliError as error:
                raise MoecliError(
                    f"`{path}` exists and is not a saved chat", "give another name"
                ) from error
        content = {
            "format": FORMAT,
            "version": 2 if self.pictures else 1,
            "model": model,
            "system": self.system,
            "turns": [_to_save(turn) for turn in self.turns],
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
    def load(cls, path: Path, look: "Callable[[Path], Picture]") -> "Conversation":
        """Read what `save` wrote; `look` reads the pictures that were shown.

        Raises MoecliError for any other file, and for a picture that has changed since.
        """
        content = _parse(path)
        conversation = cls(content["system"])
        for turn in content["turns"]:
            shown = [_look_again(image, look) for image in turn.get("images", ())]
            images = {"images": shown} if shown else {}
            conversation.turns.append({"role": turn["role"], "content": turn["content"], **images})
        return conversation


def _to_save(turn: Message) -> Message:
    if "images" not in turn:
        return turn
    files = [{"path": str(picture.path), "sha256": picture.digest} for picture in turn["images"]]
    return {**turn, "images": files}


def _look_again(image: dict[str, str], look: "Callable[[Path], Picture]") -> "Picture":
    picture = look(Path(image["path"]))
    if picture.digest != image["sha256"]:
        raise MoecliError(
            f"`{picture.path}` is not the picture that it was when the chat was saved",
            "put the old file back: what was said is about that one",
        )
    return picture


def _parse(path: Path) -> dict[str, Any]:
    """What `save` wrote, pictures as names of files; raises MoecliError for any other file."""
    content = _read(path)
    version = content.get("version")
    if content.get("format") != FORMAT:
        raise _not_a_chat(path)
    if version not in VERSIONS:
        known = " and ".join(str(one) for one in VERSIONS)
        raise MoecliError(
            f"`{path}` has version {version!r} of the format; this moecli reads {known}"
        )
    turns = content.setdefault("turns", None)
    if not _is_text(content.setdefault("system", None) or "") or not isinstance(turns, list):
        raise _not_a_chat(path)
    for index, turn in enumerate(turns):
        if not _is_message(turn) or turn["role"] != ("user", "assistant")[index % 2]:
            raise _not_a_chat(path)
    if len(turns) % 2:
        raise _not_a_chat(path)
    return content


def _is_message(turn: Any) -> bool:
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        return False
    images = turn.get("images", [])
    wanted = {"role", "content", *({"images"} if turn["role"] == "user" else ())}
    return (
        set(turn) <= wanted
        and _is_text(turn["content"])
        and isinstance(images, list)
        and all(_is_image(image) for image in images)
    )


def _is_image(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"path", "sha256"}
        and all(_is_text(part) for part in value.values())
    )


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
