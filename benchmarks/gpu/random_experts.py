"""Knows experts that nobody trained: random codes with scales that keep numbers in bounds.

They take the place of a checkpoint's, are made on the device and never stored.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from offload.disk import DiskTier
from offload.keys import ExpertKey
from quant.layout import ExpertLayout

_TEMPLATES = 8
_MARK_NBYTES = 64


def expert_blobs(layout: ExpertLayout, count: int, device: torch.device) -> list[Tensor]:
    """Experts, uint8 [layout.nbytes] each, on `device`."""
    generator = torch.Generator(device).manual_seed(0)
    return [_blob(layout, device, generator) for _ in range(count)]


def _blob(layout: ExpertLayout, device: torch.device, generator: torch.Generator) -> Tensor:
    blob = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    blob.random_(0, 256, generator=generator)
    weights = layout.views(blob)
    spread = (1 << layout.scheme.bits) / math.sqrt(12)  # of codes that are all alike likely
    for weight in (weights.gate, weights.up, weights.down):
        weight.scale.fill_(1 / (spread * math.sqrt(weight.in_features)))
    return blob


class RandomExperts(DiskTier):
    """Every expert of a model, as if it were read from a file, though there is none.

    A few experts are made and serve for all: what is measured depends on where bytes lie, and
    each has a place of its own there. So what holds one of them already is left as it is, and
    main memory that several arms share is written once.
    """

    def __init__(
        self, layout: ExpertLayout, keys: Iterable[ExpertKey], device: torch.device
    ) -> None:
        """Opens nothing."""
        self._layout, self._numbers = layout, {key: i for i, key in enumerate(keys)}
        made = expert_blobs(layout, min(_TEMPLATES, len(self._numbers)), device)
        self._templates = [blob.cpu() for blob in made]
        self._marks = {_mark(template) for template in self._templates}

    @property
    def keys(self) -> list[ExpertKey]:
        return list(self._numbers)

    @property
    def num_experts(self) -> int:
        return len(self._numbers)

    @property
    def max_nbytes(self) -> int:
        return self._layout.nbytes

    @property
    def nbytes(self) -> int:
        return self.num_experts * self._layout.nbytes

    @property
    def direct(self) -> bool:
        return False

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._numbers

    def nbytes_of(self, key: ExpertKey) -> int:
        assert key in self._numbers, f"no expert {key}"
        return self._layout.nbytes

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        """See to it that an expert is at the beginning of `buffer`."""
        template = self._templates[self._numbers[key] % len(self._templates)]
        place = torch.frombuffer(buffer, dtype=torch.uint8)[: template.numel()]
        if _mark(place) not in self._marks:
            place.copy_(template)
        return self._layout.nbytes

    def close(self) -> None:
        pass


def _mark(blob: Tensor) -> bytes:
    """By what an expert is known: what it begins and ends with."""
    return blob[:_MARK_NBYTES].numpy().tobytes() + blob[-_MARK_NBYTES:].numpy().tobytes()
