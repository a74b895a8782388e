"""Knows a decoder's steps of few tokens on the processor, as two or three compiled calls a layer.

What those calls compute is what DecoderLayer says, with the same rules for who computes experts.
Legend of the shapes: T tokens, H hidden, D head size, k experts a token.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.attention import Attention, BatchStep
from moecli.models.batch import SequenceSlice
from moecli.models.moe import Mlp, MoeBlock, Router
from quant.kernels.cpu import few
from quant.kernels.cpu.library import Library

if TYPE_CHECKING:
    from moecli.models.decoder import DecoderLayer

_SILU = 0  # `Activation` of the kernels


class FewTokens:
    """The layers of one decoder, for steps of few tokens in fp32.

    Keeps no state between steps but where the caches of its sequences lie.
    """

    def __init__(self, library: Library, layers: Sequence["FewTokensLayer"]) -> None:
        """`layers`: as `layer_calls` gives them."""
        self._library = library
        self._layers = layers
        self._places: WeakKeyDictionary[KvCache, ctypes.Array[Any]] = WeakKeyDictionary()

    @classmethod
    def of(cls, library: Library, layers: Sequence["DecoderLayer"]) -> "FewTokens | None":
        """None where there is something that the compiled calls do not know, or cannot read."""
        calls = [FewTokensLayer.of(library, index, layer) for index, layer in enumerate(layers)]
        found = [call for call in calls if call is not None]
        return cls(library, found) if len(found) == len(calls) else None

    def takes(self, step: BatchStep) -> bool:
        """Few tokens, in caches of floats, and none beyond the border of a chunk."""
        return sum(piece.length for piece in step.slices) <= few.MOST_TOKENS and all(
            piece.cache.dtype in (torch.float32, torch.bfloat16) and _in_one_chunk(piece)
            for piece in step.slices
        )

    def __call__(self, hidden: Tensor, step: BatchStep) -> Tensor:
        """hidden [T, H] -> what the last layer adds; `hidden` becomes what it is added to."""
        run = _Run(
            hidden, step, [self._places_of(piece.cache) for piece in step.slices], self._layers
        )
        delta: Tensor | None = None
        for layer in self._layers:
            delta = layer(run, delta)
        assert delta is not None, "a decoder without layers"
        return delta

    def _places_of(self, cache: KvCache) -> "ctypes.Array[Any]":
        """Where each layer keeps keys and values."""
        places = self._places.get(cache)
        if places is None:
            every = [_place(cache, layer) for layer in range(len(self._layers))]
            places = self._places[cache] = (few.PlaceArgument * len(every))(*every)
        return places


class _Run:
    """The arguments of one step, and the memory of its results."""

    def __init__(
        self,
        hidden: Tensor,
        step: BatchStep,
        places: Sequence["ctypes.Array[Any]"],
        layers: Sequence["FewTokensLayer"],
    ) -> None:
        num_layers = len(layers)
        top_k = max(layer.call.router.top_k for layer in layers)
        num_guesses = max(layer.call.guess.top_k for layer in layers)
        assert hidden.dtype == torch.float32, f"hidden states of {hidden.dtype}"
        assert hidden.is_contiguous(), "hidden states with gaps"
        count = self.tokens = hidden.shape[0]
        self.hidden = hidden  # [T, H]
        self.normed = torch.empty_like(hidden)  # [T, H]
        self.threads = torch.get_num_threads()
        ids = torch.empty(num_layers, count, top_k, dtype=torch.int64)
        weights = torch.empty(num_layers, count, top_k)
        guesses = torch.empty(num_layers, count, num_guesses, dtype=torch.int64)
        self.choices = list(zip(ids.unbind(), weights.unbind(), guesses.unbind(), strict=True))
        positions, of_tokens = (ctypes.c_int64 * count)(), (ctypes.c_void_p * count)()
        token = 0
        for piece, of_piece in zip(step.slices, places, strict=True):
            for position in range(piece.start, piece.start + piece.length):
                positions[token] = position
                of_tokens[token] = ctypes.addressof(of_piece)
                token += 1
        turns, temperature = step.turns, step.temperature
        self._kept = positions, of_tokens, turns, temperature, ids, weights, guesses
        self.argument = few.StepArgument(
            *(count, ctypes.addressof(positions), turns.data_ptr()),
            None if temperature is None else temperature.data_ptr(),
            *(ctypes.addressof(of_tokens), hidden.data_ptr(), self.normed.data_ptr()),
            *(ids.data_ptr(), weights.data_ptr(), guesses.data_ptr()),
        )
        self.reference = ctypes.byref(self.argument)


class FewTokensLayer:
    """One layer: a call up to the choice of experts, the provider's, and the MLP's."""

    def __init__(
        self,
        library: Library,
        call: few.LayerArgument,
        layer: "DecoderLayer",
        mlp: Callable[[Tensor, int], Tensor] | None,
    ) -> None:
        self._library = library
        self._layer = layer  # keeps alive what `call` points to
        self.call = call
        self._reference = ctypes.byref(call)
        self._mlp = mlp  # of all tokens; None: there is none
        self._block = layer.mlp if isinstance(layer.mlp, MoeBlock) else None
        self._lookahead = layer.lookahead

    @classmethod
    def of(cls, library: Library, index: int, layer: "DecoderLayer") -> "FewTokensLayer | None":
        """None where a weight is of a kind that the compiled calls cannot read."""
        call = _layer_argument(index, layer)
        block = layer.mlp
        shared = block.shared if isinstance(block, MoeBlock) else block
        return None if call is None else cls(library, call, layer, _mlp(library, shared))

    def __call__(self, run: _Run, delta: Tensor | None) -> Tensor:
        """What this layer adds to `run.hidden`, to which `delta` is added before. All [T, H]."""
        block, lookahead = self._block, self._lookahead
        ids, weights, guesses = run.choices[self.call.index]
        at = None
        if delta is not None:
            assert delta.dtype == torch.float32, f"a delta of {delta.dtype}"
            assert delta.is_contiguous(), "a delta with gaps"
            at = delta.data_ptr()
        self._library.layer(self._reference, run.reference, at, run.threads)
        if lookahead is not None and run.tokens in lookahead.tokens:
            lookahead.tell(guesses)
        if block is None:
            assert self._mlp is not None, "a layer without an MLP"
            return self._mlp(run.normed, run.threads)
        pending = block.experts.begin(block.layer, run.normed, ids, weights)
        if self._mlp is None:
            return pending.result()
        return self._mlp(run.normed, run.threads).add_(pending.result())


class _CompiledMlp:
    """A gated MLP in one call."""

    def __init__(self, library: Library, mlp: Mlp, weights: list[few.WeightArgument]) -> None:
        self._library = library
        self._mlp = mlp  # keeps alive what the argument points to
        self._argument = few.MlpArgument(*weights, _SILU)
        self._reference = ctypes.byref(self._argument)
        self._hidden_size = weights[2].rows

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        """x [T, H] -> [T, H]"""
        out = torch.empty(x.shape[0], self._hidden_size)
        self._library.mlp(self._reference, x.data_ptr(), x.shape[0], out.data_ptr(), threads)
        return out


def _mlp(library: Library, mlp: Mlp | None) -> Callable[[Tensor, int], Tensor] | None:
    if mlp is None:
        return None
    weights = _arguments(mlp.weights)
    if weights is not None and few.share_input(weights[:2]):
        return _CompiledMlp(library, mlp, weights)
    return lambda x, threads: mlp(x)


def _arguments(weights: Sequence[Any]) -> list[few.WeightArgument] | None:
    """None where one is of a kind that cannot be read."""
    found = [few.weight_argument(weight) for weight in weights]
    readable = [argument for argument in found if argument is not None]
    return readable if len(readable) == len(found) else None


def _layer_argument(index: int, layer: "DecoderLayer") -> few.LayerArgument | None:
    attention = layer.attention
    if not isinstance(attention, Attention):  # over latents: there is no such call
        return None
    heads = attention.heads
    pairs = zip(attention.projections, attention.biases, strict=True)
    weights = [few.weight_argument(weight, bias) for weight, bias in pairs]
    q, k, v, o = weights
    router, guess = few.RouterArgument(), few.RouterArgument()
    found = [_fill_router(router, layer.mlp.router)] if isinstance(layer.mlp, MoeBlock) else []
    if layer.lookahead is not None:
        found.append(_fill_router(guess, layer.lookahead.block.router))
        guess.top_k = layer.lookahead.guesses
    if q is None or k is None or v is None or o is None or not all(found):
        return None
    if heads.partial or heads.window is not None or heads.sinks is not None:
        return None
    if not few.share_input((q, k, v)):
        return None
    norm = heads.norm_weight
    guess_norm = None if layer.lookahead is None else layer.lookahead.norm
    size = attention.head_dim
    return few.LayerArgument(
        *(index, q.matrix.in_features, q.rows // size, k.rows // size, size),
        *(few.ROPES[heads.rope], few.NORMS[heads.norm], heads.tempered, layer.eps),
        layer.input_norm.data_ptr(),
        None if norm is None else norm.data_ptr(),
        *(layer.post_norm.data_ptr(), q, k, v, o, router, guess),
        None if guess_norm is None else guess_norm.data_ptr(),
    )


def _fill_router(argument: few.RouterArgument, router: object) -> bool:
    """False where it is a stand-in for one, of a kind that is not compiled, or its weight is."""
    weight = few.weight_argument(router.weight) if isinstance(router, Router) else None
    if not isinstance(router, Router) or weight is None or router.kind not in few.ROUTERS:
        return False
    argument.weight, argument.top_k = weight, router.top_k
    argument.sigmoid, argument.normalize = router.kind == "sigmoid", router.normalize
    return True


def _place(cache: KvCache, layer: int) -> few.PlaceArgument:
    storage = cache.storage(layer)  # [2, K, slots, D]
    assert storage.is_contiguous(), "a cache with gaps"
    values = storage[1]
    head_stride = values.stride(0) * storage.itemsize
    ring = cache.chunk_size or 0 if cache.is_ring(layer) else 0
    kind = few.FLOATS[storage.dtype]
    return few.PlaceArgument(storage.data_ptr(), values.data_ptr(), head_stride, ring, kind)


def _in_one_chunk(piece: SequenceSlice) -> bool:
    chunk, last = piece.cache.chunk_size, piece.start + piece.length - 1
    return chunk is None or piece.start // chunk == last // chunk
