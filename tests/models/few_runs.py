"""Knows how tiny decoders run: by plain PyTorch, or by compiled steps of few tokens.

Legend of the shapes: T tokens, H hidden.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.few_tokens import FewTokens
from moecli.models.moe import FloatExperts
from moecli.models.provider import Ready
from quant.kernels.cpu.library import Library, NoLibrary, library
from tests.models.few_specs import SPEC

try:
    ISAS = library().isas
except NoLibrary:
    ISAS = ()  # there is no compiler here

TOLERANCE = 1e-5


class NoExperts:
    """Experts that add nothing, and remember what was asked of them."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.chosen: list[tuple[Tensor, Tensor]] = []
        self.guessed: list[Tensor] = []

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        self.hidden.append(hidden.clone())
        self.chosen.append((topk_ids.clone(), topk_weights.clone()))
        return Ready(torch.zeros_like(hidden))

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        self.guessed.append(topk_ids.clone())

    def resident(self, layer: int) -> None:
        """They have no bytes."""


@functools.cache
def library_of(isa: str) -> Library:
    return Library(library().path, isa)


def random_weights(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for tensor in spec.dense_tensors:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.name.endswith("norm"):
            noise = 1 + 0.3 * noise
        elif len(tensor.shape) > 1:
            noise *= 1.5 * tensor.shape[1] ** -0.5
        found[tensor.name] = noise.to(dtype)
    return found


def decoder_of(
    spec: ModelSpec, weights: dict[str, Any] | None = None, experts: Any = None, guesses: int = 0
) -> Decoder:
    def load(layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(layer * 100 + expert)
        shape = (spec.expert_intermediate_size, spec.hidden_size)
        gate, up, down = (torch.randn(shape, generator=generator) / 8 for _ in range(3))
        return gate, up, down.t()

    provider = experts or FloatExperts(spec, load)
    table = weights or random_weights(spec)
    return Decoder(spec, table.__getitem__, provider, guesses=guesses)


def new_cache(spec: ModelSpec, ctx: int, dtype: torch.dtype = torch.float32) -> KvCache:
    """With numbers in it that nobody may look at."""
    cache = KvCache(spec, ctx, dtype)
    for layer in range(spec.num_layers):
        cache.storage(layer).fill_(torch.nan)
    return cache


def compiled(isa: str, decoder: Decoder) -> FewTokens:
    few = FewTokens.of(library_of(isa), decoder)
    assert few is not None, "there is no compiled way of this decoder"
    return few


@torch.inference_mode()
def run(decoder: Decoder, batch: Batch, few: FewTokens | None = None) -> Tensor:
    """What the last layer leaves, [T, H]; by plain PyTorch, or the compiled way."""
    for piece in batch.slices:
        piece.cache.begin(piece.start, piece.length)
    hidden, step = decoder.embedding(batch.token_ids), decoder.make_step(batch)
    assert few is None or few.takes(step), "the compiled way does not take this step"
    delta = decoder._all_layers(hidden, step) if few is None else few(hidden, step)
    for piece in batch.slices:
        piece.cache.commit()
    return hidden + delta


def ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(
        0, SPEC.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)
    )


def in_pieces(decoder: Decoder, cache: KvCache, sizes: list[int], few: FewTokens | None) -> Tensor:
    """[T, H] of tokens that come in pieces of these sizes."""
    pieces = ids(sum(sizes)).split(sizes)
    return torch.cat([run(decoder, Batch.of(piece, cache), few) for piece in pieces])


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.1, "too flat to tell what is broken"
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
