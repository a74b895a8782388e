"""Knows how one answer is streamed to stdout while Ctrl-C waits; knows no conversation."""

from collections.abc import Callable, Iterator
from typing import Any

from moecli import ui
from moecli.events import Event, Finished, Looking, PrefillProgress, TextDelta
from moecli.terminal import Interrupt, write_text


def stream_answer(
    generate: Callable[[Callable[[], bool]], Iterator[Event]],
    write: Callable[[str], None] = write_text,
) -> Finished:
    """Run `generate(cancelled)` to its end, writing text as it comes; Ctrl-C cancels it.

    The answer ends with a line break, its own or ours.
    """
    finished: Finished | None = None
    last = ""
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
                    write(text)
                    last = text
                case Finished():
                    finished = event
    assert finished is not None, "a generation ends with Finished"
    if last and not last.endswith("\n"):
        write("\n")
    return finished


def discard(text: str) -> None:
    """For answers that are printed when they are whole."""


def stats_dict(finished: Finished) -> dict[str, Any]:
    """The numbers of an answer for `--json`."""
    from dataclasses import asdict

    return {**asdict(finished.stats), "hit_rate": finished.stats.hit_rate}
