"""Knows when pictures of a prompt are looked at, and what of them a chunk needs; no files."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moecli.models.batch import Patches
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.prompt import Placed
from moecli.vision.kinds import KindChoices, KindCounter
from moecli.vision.tower import Tower

# A tower that asks the function before each of its parts whether to go on: see Tower.
MakeTower = Callable[[Callable[[], None]], Tower]


class _Cancelled(Exception):
    """Somebody does not want to wait for a picture any more."""


class Eye:
    """What generating needs of a model that sees: embeddings of pictures, counts of choices.

    The embeddings of a picture are kept while its tokens pass, those of others are forgotten.
    """

    def __init__(self, spec: ModelSpec, decoder: Decoder, make_tower: MakeTower) -> None:
        """`make_tower` is called at the first picture."""
        assert spec.vision is not None, "a model that sees nothing"
        self.patch_token_id = spec.vision.patch_token_id
        self._device = decoder.device
        self._make_tower = make_tower
        self._tower: Tower | None = None
        self._kept: dict[str, Tensor] = {}  # by the picture's digest, [its patches, H]
        self._cancelled: Callable[[], bool] = lambda: False
        self._counter = KindCounter(spec, decoder.device)
        self._counter.watch(decoder)

    def keep(self, placed: Sequence[Placed]) -> None:
        """Forget the embeddings of all other pictures."""
        wanted = {one.picture.digest for one in placed}
        self._kept = {digest: kept for digest, kept in self._kept.items() if digest in wanted}

    def has_seen(self, placed: Placed) -> bool:
        """Whether the picture's embeddings are kept."""
        return placed.picture.digest in self._kept

    def see(self, placed: Placed, cancelled: Callable[[], bool]) -> bool:
        """Make and keep the embeddings of a picture; False where `cancelled` said so first.

        What a card's allocator has cached is given back before and after: a plan counts the
        memory of the tower and that of a chunk of prompt once.
        """
        self._cancelled = cancelled
        try:
            if self._tower is None:
                self._tower = self._make_tower(self._go_on)
            self._empty_cache()
            self._kept[placed.picture.digest] = self._tower(placed.picture.pixels())
        except _Cancelled:
            return False
        finally:
            self._empty_cache()
        return True

    def _go_on(self) -> None:
        if self._cancelled():
            raise _Cancelled

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def patches(self, placed: Sequence[Placed], begin: int, end: int) -> Patches:
        """What stands at positions begin to end - 1; these pictures, which are kept, lie there."""
        rows, found = [], []
        for one in placed:
            inside = one.inside(begin, end)
            rows += [one.positions[index] - begin for index in inside]
            found.append(self._kept[one.picture.digest][inside.start : inside.stop])
        return Patches(torch.tensor(rows, device=self._device), torch.cat(found))

    def counting(self, num_tokens: int, patches: Patches | None) -> AbstractContextManager[None]:
        """Around the forward pass of a chunk of a prompt: its choices are counted by kind."""
        return self._counter.chunk(num_tokens, None if patches is None else patches.rows)

    def choices(self) -> KindChoices:
        """Which experts the image and text tokens of prompts have chosen since the start."""
        return self._counter.choices()
