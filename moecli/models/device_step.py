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
_SPLITS_A_UNIT = 2  # programs of attention for each multiprocessor of the device
_UNITS = 8  # multiprocessors of a device that has none of its own


def num_splits(capacity: int, kv_heads: int, device: torch.device) -> int:
    """How many parts the slots of a layer are divided into, whatever the length is then."""
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
        self._length = position + 1  # slots that this token sees in a full layer, [1]
        self._ring_length = self._length  # and in a ring, which starts anew at each chunk's border
        if cache.chunk_size is not None:
            self._ring_length = position % cache.chunk_size + 1

    def attend(self, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, N, D], k and v [1, K, D] -> [1, N * D]."""
        assert heads.window is None, "a window in a step on a device"
        assert heads.sinks is None, "attention sinks in a step on a device"
        keys_values = self._cache.storage(heads.layer)  # [2, K, C, D]
        length = self._ring_length if self._cache.is_ring(heads.layer) else self._length
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
            length,
            keys_values,
        )
        _, kv_heads, capacity, _ = keys_values.shape
        splits = num_splits(capacity, kv_heads, q.device)
        return decode_attention(queries, keys_values, length, splits, q.dtype)

    def attend_latents(self, heads: "LatentHeads", queries: Tensor, latents: Tensor) -> Tensor:
        """There is no kernel for it: see unknown_on_a_device."""
        raise AssertionError("attention over latents in a step on a device")
