"""Knows which experts the image tokens and the text tokens of prompts choose; no tower, no bytes.

Legend of the shapes: T tokens, k choices a token, E experts a layer, L MoE layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.moe import MoeBlock
from moecli.models.provider import ExpertProvider, Pending, Resident

Counts = dict[int, list[int]]  # by layer: how often each expert was chosen
_HOTTEST = 3


@dataclass(frozen=True)
class KindChoices:
    """What tokens of each kind chose, since the model was opened."""

    image: Counts
    text: Counts

    def alike(self) -> dict[int, float]:
        """By layer, the share of their choices in which both kinds agree; none without both."""
        return {
            layer: _alike(image, self.text[layer])
            for layer, image in self.image.items()
            if sum(image) and sum(self.text[layer])
        }

    @staticmethod
    def busiest(kind: Counts) -> float:
        """Share of a layer's choices that go to its most wanted expert, averaged over layers."""
        shares = [max(row) / sum(row) for row in kind.values()]
        return sum(shares) / len(shares)

    @staticmethod
    def hottest(row: list[int]) -> list[int]:
        """The most wanted experts of a layer, the first of them first."""
        return sorted(range(len(row)), key=lambda expert: -row[expert])[:_HOTTEST]


def _alike(one: list[int], other: list[int]) -> float:
    pairs = zip(one, other, strict=True)
    return sum(min(a / sum(one), b / sum(other)) for a, b in pairs)


class KindCounter:
    """Counts while a chunk of a prompt passes the layers; decode steps are not looked at."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._layers, self._num_experts = spec.moe_layers, spec.num_experts
        self._counts = torch.zeros(
            len(spec.moe_layers), 2, spec.num_experts, dtype=torch.int64, device=device
        )  # text, then image
        self._images: Tensor | None = None  # int64 [T, 1] of the chunk: 1 for an image token

    def watch(self, decoder: Decoder) -> None:
        """Count what the decoder asks its experts for."""
        blocks = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, MoeBlock)]
        for index, block in enumerate(blocks):
            block.experts = _Counted(block.experts, self, index)

    @contextmanager
    def chunk(self, num_tokens: int, rows: Tensor | None) -> Iterator[None]:
        """While it is active so many tokens pass, those in `rows` of a picture."""
        images = torch.zeros(num_tokens, 1, dtype=torch.int64, device=self._counts.device)
        if rows is not None:
            images[rows.to(images.device)] = 1
        self._images = images
        try:
            yield
        finally:
            self._images = None

    @property
    def counts(self) -> bool:
        """Whether a chunk of a prompt passes now."""
        return self._images is not None

    def count(self, index: int, topk_ids: Tensor) -> None:
        """topk_ids [T, k] of the MoE layer `index`."""
        if self._images is None:
            return
        places = (self._images * self._num_experts + topk_ids).flatten()  # [T * k]
        self._counts[index].view(-1).index_add_(0, places, torch.ones_like(places))

    def choices(self) -> KindChoices:
        """What has been counted so far. Waits for the device."""
        rows = self._counts.cpu().unbind()
        by_layer = list(zip(self._layers, rows, strict=True))
        return KindChoices(
            image={layer: row[1].tolist() for layer, row in by_layer},
            text={layer: row[0].tolist() for layer, row in by_layer},
        )


class _Counted:
    """The ExpertProvider of a layer, told of to the counter."""

    def __init__(self, experts: ExpertProvider, counter: KindCounter, index: int) -> None:
        self._experts, self._counter, self._index = experts, counter, index

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        self._counter.count(self._index, topk_ids)
        return self._experts.begin(layer, hidden, topk_ids, topk_weights)

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        self._experts.prefetch(layer, topk_ids)

    def resident(self, layer: int) -> Resident | None:
        return None if self._counter.counts else self._experts.resident(layer)
