"""Knows where dense weights lie in a run on a device: in VRAM, the input embedding perhaps not."""

from collections.abc import Callable

import torch
from torch import Tensor

from moecli.dense import DenseWeight
from moecli.models.config import ModelSpec
from offload.host import SLOT_ALIGNMENT, HostArena
from offload.pinning import Pinner
from quant.kernels.experts import memory_at
from quant.tensor import QuantizedWeight

_EMBEDDING = "embed_tokens"


class DeviceWeights:
    """A Decoder's `weights` on a device, over a loader that gives them in main memory.

    An embedding that is no head as well may stay in main memory, where the device reads the row
    that it needs: `embedding_address`; 0 where it is in VRAM, or cannot be read from there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[str], DenseWeight],
        device: torch.device,
        pinner: Pinner,
        embedding_on_device: bool,
    ) -> None:
        self._load, self._device = load, device
        self._arena: HostArena | None = None
        self._embedding: Tensor | None = None  # [V, H] in main memory
        self.embedding_address = 0
        if not (embedding_on_device or spec.tie_word_embeddings):
            self._keep_embedding(pinner)

    def _keep_embedding(self, pinner: Pinner) -> None:
        table = self._load(_EMBEDDING)
        assert isinstance(table, Tensor), "a quantized embedding"
        nbytes = -(-table.nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        arena = HostArena(nbytes, nbytes)
        arena.pin(pinner)
        memory = memory_at(arena.address(0), table.nbytes, torch.device("cpu"))
        self._embedding = memory.view(table.dtype).view(table.shape).copy_(table)
        self._arena, self.embedding_address = arena, arena.device_address(0)

    def __call__(self, name: str) -> DenseWeight:
        if name == _EMBEDDING and self._embedding is not None:
            return self._embedding
        weight = self._load(name)
        return weight.to(self._device) if isinstance(weight, Tensor | QuantizedWeight) else weight

    def close(self) -> None:
        """Give the memory back; nothing computes with these weights any more."""
        self._embedding = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None
