"""Knows the keys and values of one sequence and how long they stay; knows no model weights.

A full layer keeps every position. A chunked layer keeps one absolute chunk in a ring, slot =
position % chunk: the next chunk overwrites it from slot 0, so that what a token sees is always one
contiguous run. A sliding layer keeps one window in a ring, slot = position % window: a single token
sees all of it, in whatever order; several see copies in order. Windows that have moved on cannot go
back, so they are kept a second time as they were where a prompt ended: the next turn's may leave
out what followed. A latent layer keeps one vector for the keys and values of all heads. All memory
is taken at once; in main memory pages are mapped only as they are first written. Stored as int8,
every key and value has a scale of its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moecli.models.config import AttentionKind, ModelSpec
from moecli.models.int8_heads import SCALE_DTYPE, Int8Heads, quantize_heads

KeptHeads = Tensor | Int8Heads  # keys or values as the cache stores them, [K, L, D]


class KvCache:
    """Keys and values of one sequence of at most `ctx` tokens.

    A forward pass calls `begin`, then `append` for every layer, then `commit`. If it dies in
    between, `length` says how much is still whole.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ctx: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        assert ctx >= 1, f"a KV cache for {ctx} tokens"
        self.ctx = ctx
        self.dtype = dtype
        self.chunk_size = spec.chunk_size
        self.window = spec.window
        self._kinds = tuple(layer.attention for layer in spec.layers)
        self._chunked = tuple(kind == "chunked" for kind in self._kinds)
        self._sliding = tuple(kind == "sliding" for kind in self._kinds)
        self.device = torch.device(device)
        assert dtype != torch.int8 or spec.latent is None, "latents in int8"
        self._storage = []  # per layer [2, kv heads, capacity, D]; [1, 1, capacity, R] of latents
        for layer in range(spec.num_layers):
            kinds, heads, size = spec.kv_shape(layer)
            shape = (kinds, heads, spec.kv_capacity(layer, ctx), size)
            self._storage.append(torch.empty(shape, dtype=dtype, device=device))
        scaled = self._storage if dtype == torch.int8 else []
        self._scales = [  # per layer [2, kv heads, capacity]; none unless int8
            torch.empty(storage.shape[:-1], dtype=SCALE_DTYPE, device=device) for storage in scaled
        ]
        moving = [i for i in range(spec.num_layers) if spec.kv_copies(i, ctx) > 1]
        parts = [self._storage, self._scales] if scaled else [self._storage]
        self._windows = [part[i] for part in parts for i in moving]
        self._kept_windows = [torch.empty_like(window) for window in self._windows]
        self._remembered = 0  # tokens before the moment of which the windows are kept; 0: of none
        self._length = 0
        self._written = 0  # end of the newest write: which chunk the rings hold

    @property
    def length(self) -> int:
        """Tokens whose keys and values are whole in every layer."""
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self._storage, *self._scales, *self._kept_windows))

    @property
    def attention_dtype(self) -> torch.dtype:
        """In which attention over this cache is computed."""
        return torch.bfloat16 if self._scales else self.dtype

    def storage(self, layer: int) -> Tensor:
        """Keys and values of `layer` themselves, [2, kv heads, capacity, D]: slot by slot.

        Not of a cache in int8, where they are nothing without their scales.

        A decode step on a device writes there between `begin` and `commit`, at slot `position`, or
        in a ring at its remainder by chunk or window. It looks at the slots from 0 to that one, in
        a window that is full at all.
        """
        assert not self._scales, "numbers without their scales"
        return self._storage[layer]

    def kept(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """As `storage`, of a cache in int8 too; of that the scales too, [2, K, capacity]."""
        return self._storage[layer], self._scales[layer] if self._scales else None

    def kind(self, layer: int) -> AttentionKind:
        return self._kinds[layer]

    def is_ring(self, layer: int) -> bool:
        """Whether `layer` keeps one chunk, or one window, of tokens; else every position."""
        return self._chunked[layer] or self._sliding[layer]

    def truncate(self, length: int) -> int:
        """Forget all tokens from `length` on; returns how many are really kept.

        That is fewer when the rings no longer hold the chunk `length` lies in: then the start of
        that chunk; or the window before `length`: then what `remember` was called after, or none.
        The caller computes the difference again.
        """
        assert 0 <= length <= self._length, f"truncate {self._length} tokens to {length}"
        self._length = self._keepable(length)
        if self._length < length and 0 < self._remembered <= length + 1:
            for window, kept in zip(self._windows, self._kept_windows, strict=True):
                window.copy_(kept)
            self._written = self._remembered
            self._length = min(length, self._remembered)
        return self._length

    def remember(self) -> None:
        """Make that one can come back to here, or to one token less, from any later moment."""
        assert self._written == self._length, "in the middle of a step, or behind it"
        if self._windows:
            for window, kept in zip(self._windows, self._kept_windows, strict=True):
                kept.copy_(window)
            self._remembered = self._length

    def begin(self, start: int, count: int) -> None:
        """Announce a write of `count` tokens at `start`, which must be the length."""
        assert start == self._length, f"tokens at {start} after {self._length} in the KV cache"
        assert start + count <= self.ctx, f"{start + count} tokens in a KV cache of {self.ctx}"
        if start < self._remembered:
            self._remembered = 0  # other tokens come where those were
        self._written = start + count
        self._length = self._keepable(start)

    def commit(self) -> None:
        self._length = self._written

    def append(
        self, layer: int, start: int, keys: Tensor, values: Tensor
    ) -> Iterator[tuple[int, int, KeptHeads, KeptHeads]]:
        """Store new tokens piece by piece, and give what each piece may look at.

        Shapes: keys and values [n, kv heads, D]. Yields (first, last, keys, values): tokens first
        to last - 1 of the new ones see keys [kv heads, L, D], of which the last ones are
        their own; the views are valid until the next step of the iteration. A single token of a
        sliding layer sees its window in any order.
        """
        if self._sliding[layer]:
            yield from self._append_sliding(layer, start, keys, values)
            return
        count, first = keys.shape[0], 0
        while first < count:
            slot, last = start + first, count
            if self._chunked[layer]:
                assert self.chunk_size is not None, "a ring without a chunk size"
                slot %= self.chunk_size
                last = min(count, first + self.chunk_size - slot)
            end = slot + last - first
            self._store(layer, 0, slice(slot, end), keys[first:last])
            self._store(layer, 1, slice(slot, end), values[first:last])
            yield first, last, self._kept(layer, 0, end), self._kept(layer, 1, end)
            first = last

    def _append_sliding(
        self, layer: int, start: int, keys: Tensor, values: Tensor
    ) -> Iterator[tuple[int, int, KeptHeads, KeptHeads]]:
        """At most as many tokens a piece as slots: what they overwrite is copied before."""
        count, capacity = keys.shape[0], self._storage[layer].shape[2]
        for first in range(0, count, capacity):
            last = min(count, first + capacity)
            position, end = start + first, start + last
            slots = torch.arange(position, end, device=self.device) % capacity
            if last - first == 1:
                self._store(layer, 0, slots, keys[first:last])
                self._store(layer, 1, slots, values[first:last])
                held = min(end, capacity)
                yield first, last, self._kept(layer, 0, held), self._kept(layer, 1, held)
                continue
            oldest = max(0, position - capacity + 1)
            before = torch.arange(oldest, position, device=self.device) % capacity
            old = [self._picked(layer, part, before) for part in range(2)]
            self._store(layer, 0, slots, keys[first:last])
            self._store(layer, 1, slots, values[first:last])
            seen = [joined(old[part], self._picked(layer, part, slots)) for part in range(2)]
            yield first, last, seen[0], seen[1]

    def _picked(self, layer: int, part: int, slots: Tensor) -> KeptHeads:
        """A copy of what lies in these slots, in this order."""
        numbers = self._storage[layer][part, :, slots]
        return Int8Heads(numbers, self._scales[layer][part, :, slots]) if self._scales else numbers

    def append_latents(self, layer: int, start: int, latents: Tensor) -> Tensor:
        """Store the latents of new tokens [n, R], and give those of all tokens so far, [L, R]."""
        kept = self._storage[layer][0, 0]
        end = start + latents.shape[0]
        kept[start:end] = latents
        return kept[:end]

    def _store(self, layer: int, part: int, slots: slice | Tensor, heads: Tensor) -> None:
        """Keys (part 0) or values (part 1) [n, kv heads, D] into n slots."""
        heads = heads.transpose(0, 1)
        if self._scales:
            heads, self._scales[layer][part, :, slots] = quantize_heads(heads)
        self._storage[layer][part, :, slots] = heads.to(self.dtype)

    def _kept(self, layer: int, part: int, end: int) -> KeptHeads:
        """What lies in the slots up to `end`."""
        numbers = self._storage[layer][part, :, :end]
        if not self._scales:
            return numbers
        return Int8Heads(numbers, self._scales[layer][part, :, :end])

    def _keepable(self, length: int) -> int:
        """`length`, or the start of its chunk where the rings have moved on; 0 where windows have.

        Of a window only the oldest token may be overwritten: the next one no longer sees it.
        """
        if self.window is not None and any(self._sliding):
            whole = self._written <= min(self.window, self.ctx) or length >= self._written - 1
            return length if whole else 0
        if self.chunk_size is None or not any(self._chunked):
            return length
        held = max(self._written - 1, 0) // self.chunk_size
        in_chunk = length % self.chunk_size
        return length if in_chunk == 0 or length // self.chunk_size == held else length - in_chunk


def joined(first: KeptHeads, second: KeptHeads) -> KeptHeads:
    """Two runs of tokens as one."""
    if isinstance(first, Int8Heads) and isinstance(second, Int8Heads):
        numbers = torch.cat((first.numbers, second.numbers), dim=1)
        return Int8Heads(numbers, torch.cat((first.scales, second.scales), dim=1))
    assert isinstance(first, Tensor), "one run in int8, the other not"
    assert isinstance(second, Tensor), "one run in int8, the other not"
    return torch.cat((first, second), dim=1)
