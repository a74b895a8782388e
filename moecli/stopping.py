"""Knows when an answer's text has reached a stop string; knows no tokens."""

from collections.abc import Iterable


class StopFilter:
    """Passes text through and holds back what may yet turn out to be a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text that is certain now; after a stop string, what stood before it and then nothing."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - doubtful(self._held, self._stops))

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def doubtful(text: str, marks: Iterable[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks` and is not all of it."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
