"""Knows how lines are read: at a prompt with history, or from a pipe; knows no commands."""

import sys
from pathlib import Path
from typing import Protocol

from moecli.errors import MoecliError
from moecli.terminal import is_terminal, say

PROMPT = ">>> "
MORE_PROMPT = "... "
QUOTES = '"""'
_HISTORY_LENGTH = 1000


class Lines(Protocol):
    """Where a chat's lines come from."""

    interactive: bool

    def read(self, prompt: str) -> str:
        """The next line without its end. Raises EOFError after the last one."""
        ...


class TerminalLines:
    """Asks a person, with line editing and a history kept in `history`."""

    interactive = True

    def __init__(self, history: Path) -> None:
        self._history = history
        self._readline = _open_history(history)

    def read(self, prompt: str) -> str:
        if is_terminal(sys.stdout):
            line = input(prompt)
        else:  # stdout is data: ask on stderr
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
        return _checked(line.rstrip("\n"))

    def close(self) -> None:
        """Write the history down."""
        if self._readline is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.set_history_length(_HISTORY_LENGTH)
            self._readline.write_history_file(self._history)
            self._history.chmod(0o600)  # what people ask is theirs
        except OSError as error:
            say(f"cannot write the history `{self._history}`: {error.strerror}")


class PipedLines:
    """Reads stdin as it is piped in: UTF-8, no prompt, no echo."""

    interactive = False

    def __init__(self) -> None:
        self._offset = 0

    def read(self, prompt: str) -> str:
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            at = self._offset + error.start
            wrong = f"0x{data[error.start]:02x}"
            raise MoecliError(f"stdin is not UTF-8: byte {at} is {wrong}") from error
        self._offset += len(data)
        return line.rstrip("\r\n")

    def close(self) -> None:
        pass


def open_lines(history: Path) -> TerminalLines | PipedLines:
    return TerminalLines(history) if is_terminal(sys.stdin) else PipedLines()


def read_message(lines: Lines) -> str:
    '''One message: a line, or everything between two `"""`. Raises EOFError at the end.'''
    line = lines.read(PROMPT)
    if not line.lstrip().startswith(QUOTES):
        return line
    parts = [line.lstrip().removeprefix(QUOTES)]
    while not parts[-1].rstrip().endswith(QUOTES):
        parts.append(lines.read(MORE_PROMPT))
    parts[-1] = parts[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(parts).strip("\n")


def _checked(line: str) -> str:
    """Raises UnicodeDecodeError where the terminal sent bytes that are no UTF-8."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8")


def _open_history(path: Path):  # type: ignore[no-untyped-def]
    """The readline module with the history loaded; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    try:
        readline.read_history_file(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        say(f"cannot read the history `{path}`: {error.strerror}")
    return readline
