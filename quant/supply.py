"""Knows what a conversion asks of whoever brings it the files of its source; brings none itself."""

from collections.abc import Sequence
from typing import Protocol


class Supply(Protocol):
    """Brings the files of a source when they are needed, and takes them away again."""

    def room_nbytes(self) -> int:
        """What files of the source will take of the disk at most, beyond what they take now."""

    def begin(self, names: Sequence[str], left_nbytes: int) -> None:
        """These files are needed, in this order; so many bytes of the result are not written."""

    def take(self, name: str) -> None:
        """Return when the file is there."""

    def written(self, left_nbytes: int) -> None:
        """So many bytes of the result are still not written."""

    def release(self, name: str) -> None:
        """What came of the file is on disk; it is not needed again."""

    def close(self) -> None:
        """No more is needed, for now at least."""


class AllThere:
    """The supply of a source whose files lie on this disk and stay there."""

    def room_nbytes(self) -> int:
        return 0

    def begin(self, names: Sequence[str], left_nbytes: int) -> None:
        """Nothing need be brought."""

    def take(self, name: str) -> None:
        """It is there."""

    def written(self, left_nbytes: int) -> None:
        """The room does not matter."""

    def release(self, name: str) -> None:
        """It stays."""

    def close(self) -> None:
        """Nothing goes on."""
