"""Knows how sequences of different lengths share one forward pass: laid end to end, no padding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moecli.kv_cache import KvCache


@dataclass(frozen=True)
class SequenceSlice:
    """`length` new tokens of one sequence, the first at position `start` = cache.length."""

    cache: KvCache
    start: int
    length: int


@dataclass(frozen=True)
class Patches:
    """Rows of a batch whose embeddings are not those of their tokens: parts of pictures."""

    rows: Tensor  # [P] int64
    embeddings: Tensor  # [P, H]


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, one after the other."""

    token_ids: Tensor  # [T] int64
    slices: tuple[SequenceSlice, ...]  # in the order of the tokens; their lengths sum to T
    all_logits: bool = False  # logits of every token, not only of each sequence's last
    patches: Patches | None = None

    def __post_init__(self) -> None:
        total = sum(piece.length for piece in self.slices)
        assert total == self.token_ids.numel(), f"{self.token_ids.numel()} tokens, slices {total}"
        assert all(piece.length > 0 for piece in self.slices), "a slice without tokens"
        caches = {id(piece.cache) for piece in self.slices}
        assert len(caches) == len(self.slices), "two slices of one sequence in a batch"

    @classmethod
    def of(cls, token_ids: Tensor, cache: KvCache, all_logits: bool = False) -> "Batch":
        """The next tokens of a single sequence."""
        return cls(token_ids, (SequenceSlice(cache, cache.length, token_ids.numel()),), all_logits)

    @property
    def end(self) -> int:
        """One past the largest position."""
        return max(piece.start + piece.length for piece in self.slices)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each token in its own sequence, [T] int64."""
        runs = [torch.arange(s.start, s.start + s.length, device=device) for s in self.slices]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def last_rows(self) -> list[int]:
        """Row of each sequence's last token."""
        rows, end = [], 0
        for piece in self.slices:
            end += piece.length
            rows.append(end - 1)
        return rows
