"""Knows what a conversion asks of whoever brings it the files of its source; brings none itself."""

import math
from collections.abc import Mapping
from typing import Protocol


class Supply(Protocol):
    """Brings the files of a source when they are needed, and takes them away again."""

    def room_nbytes(self) -> int:
        """What files of the source will take of the disk at most, beyond what they take now."""

    def download_nbytes(self) -> int:
        """What must still be brought of all files."""

    def measure_rate(self) -> float:
        """Bytes a second at which files come, by a short try."""

    def begin(self, later_nbytes: Mapping[str, int]) -> None:
        """These files are needed, in this order. Of each: the bytes of the result that will come
        of the files after it, which is room that may be used until then.
        """

    def take(self, name: str) -> None:
        """Return when the file is there."""

    def release(self, name: str) -> None:
        """What came of the file is on disk; it is not needed again."""

    def close(self) -> None:
        """No more is needed, for now at least."""


class AllThere:
    """The supply of a source whose files lie on this disk and stay there."""

    def room_nbytes(self) -> int:
        return 0

    def download_nbytes(self) -> int:
        return 0

    def measure_rate(self) -> float:
        return math.inf

    def begin(self, later_nbytes: Mapping[str, int]) -> None:
        """Nothing need be brought."""

    def take(self, name: str) -> None:
        """It is there."""

    def release(self, name: str) -> None:
        """It stays."""

    def close(self) -> None:
        """Nothing goes on."""
