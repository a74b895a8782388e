"""Knows which tokens of a prompt stand for which picture; no tensors, no model."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from moecli.errors import MoecliError

if TYPE_CHECKING:
    from moecli.vision.picture import Picture


@dataclass(frozen=True)
class Placed:
    """A picture and the positions of its patches, ascending."""

    picture: "Picture"
    positions: tuple[int, ...]

    def inside(self, begin: int, end: int) -> range:
        """Which of its patches are at the positions begin to end - 1."""
        return range(bisect_left(self.positions, begin), bisect_left(self.positions, end))

    @property
    def start(self) -> int:
        return self.positions[0]

    def is_same(self, other: "Placed") -> bool:
        return (self.start, self.picture.digest) == (other.start, other.picture.digest)


@dataclass(frozen=True)
class Prompt:
    """A whole context."""

    token_ids: list[int]
    pictures: tuple[Placed, ...] = ()  # in the order of their positions

    def within(self, begin: int, end: int) -> list[Placed]:
        """The pictures with a patch at one of the positions begin to end - 1."""
        return [placed for placed in self.pictures if placed.inside(begin, end)]


def place(token_ids: list[int], pictures: Sequence["Picture"], patch_id: int) -> Prompt:
    """The patches among the tokens are those of the pictures, one picture after the other.

    Raises MoecliError where there are not as many.
    """
    found = [position for position, token in enumerate(token_ids) if token == patch_id]
    wanted = sum(picture.num_patches for picture in pictures)
    if len(found) != wanted:
        raise MoecliError(
            f"the prompt has {len(found)} patches for pictures that take {wanted}",
            "leave `<|patch|>` out of what is said: it stands for a part of a picture",
        )
    placed, begin = [], 0
    for picture in pictures:
        end = begin + picture.num_patches
        placed.append(Placed(picture, tuple(found[begin:end])))
        begin = end
    return Prompt(token_ids, tuple(placed))


def first_difference(ours: Sequence[Placed], theirs: Sequence[Placed]) -> int | None:
    """The first position where the pictures of two prompts differ; None where they do not."""
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None or not one.is_same(other):
            return min(placed.start for placed in (one, other) if placed is not None)
    return None
