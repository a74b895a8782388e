"""Knows how one answer is streamed to stdout while Ctrl-C waits; knows no conversation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from moecli import ui
from moecli.events import Event, Finished, Looking, PrefillProgress, TextDelta
from moecli.markup import Piece, Splitter, joined
from moecli.terminal import Interrupt, write_text


class Writer(Protocol):
    """Where an answer goes as it comes."""

    def write(self, piece: Piece) -> None: ...

    def end(self) -> None:
        """The answer is whole."""


@dataclass(frozen=True)
class Answer:
    """One answer: as the model wrote it, and divided."""

    finished: Finished
    pieces: list[Piece]

    @property
    def text(self) -> str:
        """What is for its reader."""
        return joined(self.pieces, "text")

    @property
    def reasoning(self) -> str:
        return joined(self.pieces, "reasoning")

    @property
    def never_began(self) -> bool:
        """Whether it was cut off before any text, while the model was still reasoning or before."""
        if self.finished.reason == "stop" or self.text.strip():
            return False
        return self.finished.reason == "cancelled" or bool(self.reasoning)


def stream_answer(
    generate: Callable[[Callable[[], bool]], Iterator[Event]], splitter: Splitter, writer: Writer
) -> Answer:
    """Run `generate(cancelled)` to its end, writing what it says as it comes; Ctrl-C cancels it."""
    finished: Finished | None = None
    pieces: list[Piece] = []

    def write(new: list[Piece]) -> None:
        for piece in new:
            writer.write(piece)
        pieces.extend(new)

    with (
        Interrupt() as interrupt,
        ui.counting_line("reading the prompt", "tokens") as status,
        ui.counting_line("looking at pictures", "seen") as looking,
    ):
        for event in generate(interrupt):
            match event:
                case Looking(number, total):
                    status.stop()
                    looking.update(number - 1, total)
                case PrefillProgress():
                    looking.stop()
                    status.update(event.done, event.total)
                case TextDelta(text):
                    write(splitter.feed(text))
                case Finished():
                    finished = event
    assert finished is not None, "a generation ends with Finished"
    write(splitter.finish())
    writer.end()
    return Answer(finished, pieces)


class StreamWriter:
    """Text to stdout, ending with a line break, its own or ours; reasoning to people alone."""

    def __init__(self) -> None:
        self._last = ""
        self._thoughts = ui.Thoughts()

    def write(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self._thoughts.write(piece.text)
        else:
            self._thoughts.end()
            write_text(piece.text)
            self._last = piece.text

    def end(self) -> None:
        self._thoughts.end()
        if self._last and not self._last.endswith("\n"):
            write_text("\n")


class NoWriter:
    """For answers that are printed when they are whole."""

    def write(self, piece: Piece) -> None: ...

    def end(self) -> None: ...


def stats_dict(finished: Finished) -> dict[str, Any]:
    """The numbers of an answer for `--json`."""
    from dataclasses import asdict

    return {**asdict(finished.stats), "hit_rate": finished.stats.hit_rate}
