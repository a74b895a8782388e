"""Knows what one sequence leaves behind in a model of the library, and how much can be taken back.

Legend: K kv heads, L tokens so far, D head size.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class HfCache:
    """The library's own cache of one sequence, with what a Session wants to know of it."""

    def __init__(self, ctx: int) -> None:
        """Of at most `ctx` tokens; the model makes its layers when it first runs."""
        self.ctx = ctx
        self.library: Any = None  # a transformers Cache, or None while it is empty
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens that are whole in every layer; 0 once a step has failed."""
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(nbytes_of(layer) for layer in layers_of(self.library))

    def begin(self, start: int, count: int) -> None:
        """Announce `count` tokens at `start`, which must be the length."""
        assert start == self._length, f"tokens at {start} after {self._length} in the cache"
        assert start + count <= self.ctx, f"{start + count} tokens in a cache of {self.ctx}"
        if start == 0:
            self.library = None  # a step that failed may have left some
        self._length = 0  # nothing is whole until `commit`

    def commit(self, library: Any, length: int) -> None:
        """`library` is the cache of the first `length` tokens."""
        if self.library is None:
            for index, layer in enumerate(library.layers):
                if type(layer) is DynamicLayer and layer.is_initialized:
                    library.layers[index] = RoomyLayer(layer, self.ctx)
        self.library = library
        self._length = length

    def truncate(self, length: int) -> int:
        """Forget the tokens from `length` on; returns how many are really kept.

        None are where a layer cannot go back: recurrent ones, and windows that have moved on.
        """
        assert 0 <= length <= self._length, f"truncate {self._length} tokens to {length}"
        if length == self._length:
            return length
        if length == 0 or not all(_goes_back(layer) for layer in layers_of(self.library)):
            self.library, self._length = None, 0
            return 0
        for layer in layers_of(self.library):
            layer.crop(length - self._length)
        self._length = length
        return length

    def remember(self) -> None:
        """Nothing is kept twice: what cannot go back is computed anew."""


class RoomyLayer(DynamicLayer):
    """A DynamicLayer that has memory for all tokens from the start, instead of copying at each.

    Pages of main memory are mapped as they are first written.
    """

    def __init__(self, first: DynamicLayer, ctx: int) -> None:
        """`first` has the first tokens, [1, K, L, D] each."""
        super().__init__()
        self.lazy_initialization(first.keys, first.values)
        self._keys, self._values = (
            part.new_empty(*part.shape[:-2], ctx, part.shape[-1])
            for part in (first.keys, first.values)
        )
        self.keys, self.values = self._keys[..., :0, :], self._values[..., :0, :]
        self.update(first.keys, first.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [1, K, n, D] -> all, [1, K, L + n, D], not copied."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values


def layers_of(library: Any) -> list[Any]:
    return [] if library is None else list(library.layers)


def nbytes_of(layer: Any) -> int:
    """What the tensors of a layer of a cache take, whatever it calls them; of views, the whole."""
    storages = {}
    for tensor in _tensors(layer):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in _tensors(item))
    elif hasattr(value, "__dict__"):
        yield from (tensor for item in vars(value).values() for tensor in _tensors(item))


def recurrent(library: Any) -> bool:
    """Whether some layer has a state that each token changes for good."""
    return any(hasattr(layer, "recurrent_states") for layer in layers_of(library))


def _goes_back(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) in (DynamicLayer, RoomyLayer)
