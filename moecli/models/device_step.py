"""Knows one token of one sequence whose position lies on the device; nothing of graphs or sampling.

Everything here is an operation of the device with shapes that never change: captured once as a
graph, a step is right at every position. Legend: N query heads, K key heads, D head size.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.attention import Heads, Positions
from moecli.models.fused import decode_attention, rotate_and_store

if TYPE_CHECKING:
    from moecli.models.latent import LatentHeads

SPLIT_SLOTS = 256  # least slots a split of attention is worth having for
LATENT_HEADS = 16  # that share what they read of latents
_SPLITS_A_UNIT = 2  # programs of attention for each multiprocessor of the device
_UNITS = 8  # multiprocessors of a device that has none of its own


def num_splits(capacity: int, kv_heads: int, device: torch.device) -> int:
    """How many parts the slots of a layer are divided into, whatever the length is then.

    `kv_heads`: key heads, or as many sets of heads as read the slots each for themselves.
    """
    units = _UNITS
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
    enough = -(-_SPLITS_A_UNIT * units // kv_heads)
    return max(1, min(-(-capacity // SPLIT_SLOTS), enough))


class DeviceStep:
    """The Step of one token of one sequence; see Step.

    The host announces the token to the cache (`begin`) and says that it is whole (`commit`); this
    writes to the storage of the cache, where `position` says.
    """

    looks_ahead = False
    rows = None

    def __init__(self, positions: Positions, cache: KvCache, position: Tensor) -> None:
        """position: int64 [1] on the device, less than the context of the cache."""
        self._cache = cache
        self._turns = positions.turns(position)
        self._temperature = positions.temperatures(position)
        # By kind of layer: which slot is this token's, and how many it sees from the first on, [1].
        everything = position, position + 1
        self._places = {"full": everything, "latent": everything}
        if cache.chunk_size is not None:  # a ring that starts anew at each chunk's border
            slot = position % cache.chunk_size
            self._places["chunked"] = slot, slot + 1
        if cache.window is not None:  # a ring whose slots are seen in whatever order they lie
            window = cache.window
            self._places["sliding"] = position % window, (position + 1).clamp(max=window)

    def attend(self, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, N, D], k and v [1, K, D] -> [1, N * D]."""
        keys_values = self._cache.storage(heads.layer)  # [2, K, C, D]
        slot, length = self._places[self._cache.kind(heads.layer)]
        queries = rotate_and_store(
            q,
            k,
            v,
            self._turns,
            self._temperature if heads.tempered else None,
            heads.norm_weight,
            heads.rope,
            heads.norm,
            heads.eps,
            slot,
            keys_values,
        )
        _, kv_heads, capacity, _ = keys_values.shape
        splits = num_splits(capacity, kv_heads, q.device)
        return decode_attention(queries, keys_values, length, splits, q.dtype, heads.sinks)

    def attend_latents(self, heads: "LatentHeads", queries: Tensor, latents: Tensor) -> Tensor:
        """queries [1, N, K + P] and latents [1, R + P] -> [1, N * V]; see LatentHeads."""
        queries, latents = heads.position(queries, latents, self._turns)
        kept = self._cache.storage(heads.layer)[0, 0]  # [C, R + P]
        slot, length = self._places[self._cache.kind(heads.layer)]
        kept.index_copy_(0, slot, latents.to(kept.dtype))
        splits = num_splits(kept.shape[0], -(-queries.shape[1] // LATENT_HEADS), kept.device)
        return heads.decode(queries, kept, length, splits)
