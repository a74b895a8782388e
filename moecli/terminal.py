"""Knows what a stream can show, and how Ctrl-C becomes a flag; knows nothing of models.

No Rich here: errors, help and streamed text must not wait for it.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import TextIO


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def has_colors(stream: TextIO) -> bool:
    """Whether escape codes are wanted: a terminal, no NO_COLOR, not a dumb one."""
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def styled(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_colors(stream) else text


def bold(text: str, stream: TextIO) -> str:
    return styled(text, "1", stream)


def dim(text: str, stream: TextIO) -> str:
    return styled(text, "2", stream)


def say(message: str) -> None:
    """One message to the person, on stderr."""
    print(message, file=sys.stderr, flush=True)


# What a model must not send to a terminal: control characters, escapes above all. They are shown.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def for_terminal(text: str) -> str:
    """Model text as a terminal may have it."""
    return text.translate(_PICTURES)


def write_text(text: str) -> None:
    """Model text, at once, never through markup; piped, exactly as it is."""
    sys.stdout.write(for_terminal(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


class Interrupt:
    """While active, Ctrl-C raises a flag to be read between tokens instead of an exception.

    A second Ctrl-C, when the flag was not read for whatever reason, is KeyboardInterrupt again.
    """

    def __init__(self) -> None:
        self.raised = False

    def __call__(self) -> bool:
        return self.raised

    def __enter__(self) -> "Interrupt":
        self.raised = False
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
