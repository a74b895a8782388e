"""Knows the values of weights that nobody trained: the same for a name wherever it is asked for.

NumPy only. All matrices are cut from one run of normal numbers at places that their names decide:
to draw billions would take longer than everything that is measured.
"""

import math
import zlib

import numpy as np

from benchmarks.llama.naming import Named

_COUNT = 16_777_213  # a prime, so that no matrix repeats a row
_SEED = 20261125


class Numbers:
    """Weights as the upper halves of fp32 numbers, which is what bf16 is."""

    def __init__(self) -> None:
        self._normal = np.random.default_rng(_SEED).standard_normal(_COUNT, dtype=np.float32)
        self._scaled: dict[float, np.ndarray] = {}

    def bf16(self, tensor: Named) -> np.ndarray:
        """uint16 [*shape]: ones of norms, else normal numbers that keep activations in size.

        Embeddings have a spread of one, so that the routers, which see nothing but them and what
        layers made of them, choose other experts for other tokens, all about equally often.
        """
        if tensor.is_norm:
            return np.full(tensor.shape, 0x3F80, np.uint16)
        is_embedding = tensor.gguf == "token_embd.weight"
        source = self._with_spread(1.0 if is_embedding else 1 / math.sqrt(tensor.shape[1]))
        count = math.prod(tensor.shape)
        out = np.empty(count, np.uint16)
        place, done = zlib.crc32(tensor.hf.encode()) % _COUNT, 0
        while done < count:
            piece = source[place : place + count - done]
            out[done : done + len(piece)] = piece
            done, place = done + len(piece), 0
        return out.reshape(tensor.shape)

    def fp32(self, tensor: Named) -> np.ndarray:
        """The same values, float32 [*shape]."""
        return (self.bf16(tensor).astype(np.uint32) << 16).view(np.float32)

    def _with_spread(self, spread: float) -> np.ndarray:
        """The run of numbers in bf16, rounded to nearest, uint16 [count]."""
        if spread not in self._scaled:
            bits = (self._normal * np.float32(spread)).view(np.uint32)
            self._scaled[spread] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return self._scaled[spread]


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp's "llama" wants them: row i of a head beside row i plus
    half a head, which turn together."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
