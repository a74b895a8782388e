"""Knows AWQ as AutoAWQ's `gemm` packs it: 4 bits, eight neighbouring outputs in a word, in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; zero points likewise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.sources.input_major import WORD_BITS, InputMajorTensor
from quant.sources.packed import Format, misfit, modules, require

_BITS = 4
# The place in a word of the eight outputs in turn.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class AwqTensor(InputMajorTensor):
    def qweight_shape(self) -> tuple[int, int]:
        return self.shape[1], self.shape[0] // self.per_word

    def codes(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        name = f"{self.name.removesuffix('.weight')}.qweight"
        first, last = start // self.per_word, stop // self.per_word
        return self.zero_points(stored.read_columns(name, first, last))

    def zero_points(self, words: Tensor) -> Tensor:
        shifts = torch.tensor(_PLACES, dtype=torch.int32) * _BITS
        return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << _BITS) - 1).flatten(1)


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[AwqTensor]:
    version, bits = str(said.get("version") or "gemm").lower(), said.get("bits", _BITS)
    if version != "gemm" or bits != _BITS:
        raise QuantError(
            f"the source is AWQ of {bits} bits packed for `{version}`, which is not read",
            "read is the packing `gemm` of 4 bits",
        )
    for module in modules(stored, "qweight"):
        words, _, scales = (require(stored, f"{module}.{part}") for part in _PARTS)
        if len(words.shape) != 2 or len(scales.shape) != 2:
            raise misfit(f"{module}.qweight", words.shape, "or its scales are no matrices")
        in_features = words.shape[0]
        yield AwqTensor(
            name=f"{module}.weight",
            dtype=scales.dtype,
            shape=(words.shape[1] * WORD_BITS // _BITS, in_features),
            parts=tuple(f"{module}.{part}" for part in _PARTS),
            bits=_BITS,
            group_size=-(-in_features // max(1, scales.shape[0])),
            group_of=None,
        )


FORMAT = Format("awq", "AWQ (4 bits, `gemm`)", _packed_tensors, lambda said: "AWQ 4-bit")
