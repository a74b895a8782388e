"""Knows a decoder's steps of few tokens on the processor: one compiled call, where nothing is in
its way.

It returns early where a layer's experts must be fetched first, or its MLP cannot be read; that is
then done here, and a call goes on behind it. What is computed is what DecoderLayer says, with the
same rules for who computes experts.
Legend of the shapes: T tokens, S sequences, H hidden, V vocabulary, k experts a token.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.attention import BatchStep
from moecli.models.batch import SequenceSlice
from moecli.models.few_arguments import (
    layer_argument,
    mlp_argument,
    place_argument,
    residents_argument,
)
from moecli.models.moe import Mlp, MoeBlock
from moecli.models.provider import Resident
from quant.kernels.cpu import few
from quant.kernels.cpu.library import Library
from quant.ops import linear

if TYPE_CHECKING:
    from moecli.models.decoder import Decoder, DecoderLayer


class FewTokens:
    """The layers and the head of one decoder, for steps of few tokens in fp32.

    Keeps no state between steps but where things lie, and memory to work in.
    """

    def __init__(
        self, library: Library, decoder: "Decoder", layers: Sequence["FewTokensLayer"]
    ) -> None:
        self._library = library
        self._layers = layers
        self._head = decoder.head  # [V, H]
        self._norm = decoder.norm  # keeps alive what the argument points to
        self._blocks = _pointers([layer.argument for layer in layers])
        head = few.weight_argument(decoder.head)
        self._reads_head = head is not None
        self._argument = few.DecoderArgument(
            *(len(layers), ctypes.addressof(self._blocks)),
            *(decoder.norm.data_ptr(), decoder.spec.rms_norm_eps, head or few.WeightArgument()),
        )
        self._reference = ctypes.byref(self._argument)
        self._steps: dict[int, _Step] = {}  # by their number of tokens
        self._places: WeakKeyDictionary[KvCache, ctypes.Array[Any]] = WeakKeyDictionary()

    @classmethod
    def of(cls, library: Library, decoder: "Decoder") -> "FewTokens | None":
        """None where there is something that the compiled call does not know, or cannot read."""
        layers = decoder.layers
        found = [FewTokensLayer.of(library, index, layer) for index, layer in enumerate(layers)]
        readable = [layer for layer in found if layer is not None]
        return cls(library, decoder, readable) if len(readable) == len(found) else None

    def takes(self, step: BatchStep) -> bool:
        """Few tokens, in caches of these kinds, and none that overwrites what another looks at."""
        return sum(piece.length for piece in step.slices) <= few.MOST_TOKENS and all(
            piece.cache.dtype in few.KEPT and _fits_the_rings(piece) for piece in step.slices
        )

    def __call__(self, hidden: Tensor, step: BatchStep) -> Tensor:
        """hidden [T, H] -> what the last layer adds; `hidden` becomes what it is added to.

        The result lies where that of the next step will lie.
        """
        return self._run(hidden, step, [], None).delta

    def logits(self, hidden: Tensor, step: BatchStep) -> Tensor:
        """hidden [T, H], of which nothing stays, -> logits fp32 of the step's rows, [rows, V]."""
        rows = list(range(hidden.shape[0])) if step.rows is None else step.rows
        if not self._reads_head:
            normed = self._run(hidden, step, rows, None).normed[: len(rows)]
            return linear(normed, self._head).float()
        out = torch.empty(len(rows), self._argument.head.rows)  # [rows, V]
        self._run(hidden, step, rows, out)
        return out

    def _run(
        self, hidden: Tensor, step: BatchStep, rows: list[int], logits: Tensor | None
    ) -> "_Step":
        count, threads = hidden.shape[0], torch.get_num_threads()
        if count not in self._steps:
            self._steps[count] = _Step(count, hidden.shape[1], self._layers)
        run = self._steps[count]
        run.begin(hidden, step, [self._places_of(piece.cache) for piece in step.slices])
        run.want(rows, logits)
        for layer in self._layers:
            layer.look_at_residents()
        at, added = 0, None
        while True:
            where = None if added is None else added.data_ptr()
            at = self._library.step(self._reference, run.reference, at, where, threads)
            if at == len(self._layers):
                return run
            added = self._layers[at].finish(run, threads)
            assert added.dtype == torch.float32, f"a delta of {added.dtype}"
            assert added.is_contiguous(), "a delta with gaps"
            at += 1

    def _places_of(self, cache: KvCache) -> "ctypes.Array[Any]":
        """Where each layer keeps keys and values."""
        places = self._places.get(cache)
        if places is None:
            every = [place_argument(cache, layer) for layer in range(len(self._layers))]
            places = self._places[cache] = (few.PlaceArgument * len(every))(*every)
        return places


class _Step:
    """The arguments of steps of so many tokens, and the memory of their results."""

    def __init__(self, count: int, hidden_size: int, layers: Sequence["FewTokensLayer"]) -> None:
        self.tokens = count
        self.normed = torch.empty(count, hidden_size)  # [T, H]
        self.delta = torch.empty(count, hidden_size)  # [T, H]
        calls = [layer.argument.layer for layer in layers]
        top_k = max(call.router.top_k for call in calls)
        num_guesses = max(call.guess.top_k for call in calls)
        ids = torch.empty(len(layers), count, top_k, dtype=torch.int64)
        weights = torch.empty(len(layers), count, top_k)
        guesses = torch.empty(len(layers), count, num_guesses, dtype=torch.int64)
        self.choices = list(zip(ids.unbind(), weights.unbind(), guesses.unbind(), strict=True))
        self._positions, self._rows = (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
        self._of_tokens = (ctypes.c_void_p * count)()
        self.argument = few.StepArgument(
            tokens=count,
            positions=ctypes.addressof(self._positions),
            places=ctypes.addressof(self._of_tokens),
            normed=self.normed.data_ptr(),
            delta=self.delta.data_ptr(),
            ids=ids.data_ptr(),
            weights=weights.data_ptr(),
            guesses=guesses.data_ptr(),
            rows=ctypes.addressof(self._rows),
        )
        self.reference = ctypes.byref(self.argument)

    def begin(self, hidden: Tensor, step: BatchStep, places: Sequence["ctypes.Array[Any]"]) -> None:
        """These tokens come next; the tensors must live as long as the step."""
        assert hidden.dtype == torch.float32, f"hidden states of {hidden.dtype}"
        assert hidden.is_contiguous(), "hidden states with gaps"
        token = 0
        for piece, of_piece in zip(step.slices, places, strict=True):
            at = ctypes.addressof(of_piece)
            for position in range(piece.start, piece.start + piece.length):
                self._positions[token], self._of_tokens[token] = position, at
                token += 1
        argument, temperature = self.argument, step.temperature
        argument.hidden, argument.turns = hidden.data_ptr(), step.turns.data_ptr()
        argument.temperature = None if temperature is None else temperature.data_ptr()

    def want(self, rows: list[int], logits: Tensor | None) -> None:
        """The rows of tokens whose logits are wanted, and where they go, [rows, V]."""
        for index, row in enumerate(rows):
            self._rows[index] = row
        self.argument.row_count = len(rows)
        self.argument.logits = None if logits is None else logits.data_ptr()


class FewTokensLayer:
    """One layer, and what is done here where the compiled call cannot do it."""

    def __init__(
        self,
        library: Library,
        call: few.LayerArgument,
        layer: "DecoderLayer",
    ) -> None:
        self._library = library
        self._layer = layer  # keeps alive what `call` points to
        block = layer.mlp
        self._block = block if isinstance(block, MoeBlock) else None
        self._mlp: Mlp | None = block.shared if isinstance(block, MoeBlock) else block
        self._lookahead = layer.lookahead
        compiled = None if self._mlp is None else mlp_argument(self._mlp.weights)
        self._compiled_mlp = compiled is not None
        readable = self._mlp is None or self._compiled_mlp
        self.argument = few.BlockArgument(
            call,
            compiled or few.MlpArgument(),
            residents_argument(None),
            readable and self._lookahead is None,  # guesses are told from here
        )
        self._reference = ctypes.byref(self.argument.mlp)
        self._resident: Resident | None = None

    @classmethod
    def of(cls, library: Library, index: int, layer: "DecoderLayer") -> "FewTokensLayer | None":
        """None where a weight is of a kind that the compiled call cannot read."""
        call = layer_argument(index, layer)
        return None if call is None else cls(library, call, layer)

    def look_at_residents(self) -> None:
        """Learn where this layer's experts may be used now."""
        if self._block is None:
            return
        found = self._block.experts.resident(self._block.layer)
        if found is not self._resident:
            self._resident = found  # keeps alive what the argument points to
            self.argument.experts = residents_argument(found)

    def finish(self, run: _Step, threads: int) -> Tensor:
        """What this layer adds to the hidden states, [T, H], after attention."""
        block, lookahead = self._block, self._lookahead
        ids, weights, guesses = run.choices[self.argument.layer.index]
        if lookahead is not None and run.tokens in lookahead.tokens:
            lookahead.tell(guesses)
        if block is None:
            return self._all_tokens(run.normed, threads)
        pending = block.experts.begin(block.layer, run.normed, ids, weights)
        if self._mlp is None:
            return pending.result()
        return self._all_tokens(run.normed, threads).add_(pending.result())

    def _all_tokens(self, x: Tensor, threads: int) -> Tensor:
        """The MLP of all tokens, x [T, H] -> [T, H]."""
        assert self._mlp is not None, "a layer without an MLP"
        if not self._compiled_mlp:
            return self._mlp(x)
        out = torch.empty_like(x)
        self._library.mlp(self._reference, x.data_ptr(), x.shape[0], out.data_ptr(), threads)
        return out


def _pointers(arguments: Sequence[Any]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))


def _fits_the_rings(piece: SequenceSlice) -> bool:
    """One token always does; several must stay in one chunk, and in the first window."""
    cache, end = piece.cache, piece.start + piece.length
    if piece.length == 1:
        return True
    if cache.window is not None and end > cache.window:
        return False
    chunk = cache.chunk_size
    return chunk is None or piece.start // chunk == (end - 1) // chunk
