"""Knows what a conversion asks of whoever brings it the files of its source; brings none itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class FileTurn:
    """A file of the source that is needed next. `later_nbytes`: bytes of the result that come of
    the turns after it, which is room that may be used until then. `held`: files before it that are
    needed in its turn too, or later, because tensors that belong together lie in both.
    """

    name: str
    later_nbytes: int
    held: tuple[str, ...] = ()


class Supply(Protocol):
    """Brings the files of a source when they are needed, and takes them away again."""

    takes_away: bool  # whether `release` does: then what came of a file must be on disk before

    def room_nbytes(self, turns: Sequence[FileTurn]) -> int:
        """What files of the source will take of the disk at most, beyond what they take now."""

    def download_nbytes(self) -> int:
        """What must still be brought of all files."""

    def measure_rate(self) -> float:
        """Bytes a second at which files come, by a short try."""

    def begin(self, turns: Sequence[FileTurn]) -> None:
        """These files are needed, in this order."""

    def take(self, name: str) -> None:
        """Return when the file is there."""

    def release(self, name: str) -> None:
        """The file is not needed again."""

    def close(self) -> None:
        """No more is needed, for now at least."""


class AllThere:
    """The supply of a source whose files lie on this disk and stay there."""

    takes_away = False

    def room_nbytes(self, turns: Sequence[FileTurn]) -> int:
        return 0

    def download_nbytes(self) -> int:
        return 0

    def measure_rate(self) -> float:
        return math.inf

    def begin(self, turns: Sequence[FileTurn]) -> None:
        """Nothing need be brought."""

    def take(self, name: str) -> None:
        """It is there."""

    def release(self, name: str) -> None:
        """It stays."""

    def close(self) -> None:
        """Nothing goes on."""
