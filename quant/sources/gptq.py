"""Knows GPTQ: codes of 4 or 8 bits packed along the inputs, zero points along the outputs.

Version 1 stores zero points less one. With `desc_act`, `g_idx` names the group of each input.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.sources.input_major import WORD_BITS, InputMajorTensor
from quant.sources.packed import Format, misfit, modules, present, require

_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to zero points
_BITS = (4, 8)


@dataclass(frozen=True)
class GptqTensor(InputMajorTensor):
    zero_offset: int

    def qweight_shape(self) -> tuple[int, int]:
        return self.shape[1] // self.per_word, self.shape[0]

    def codes(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        words = stored.read_columns(f"{self.name.removesuffix('.weight')}.qweight", start, stop)
        return _unpack(words.unsqueeze(1), self.bits, 1).flatten(0, 1)

    def zero_points(self, words: Tensor) -> Tensor:
        # Less one, a zero point of 0 has become the highest code: hence the mask.
        zero = _unpack(words.unsqueeze(2), self.bits, 2).flatten(1)
        return zero.add_(self.zero_offset).bitwise_and_((1 << self.bits) - 1)


def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes in the dimension `dim`, which has the size 1 in words; lowest bits first."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    shape = [1, 1, 1]
    shape[dim] = len(shifts)
    return (words >> shifts.view(shape)).bitwise_and_((1 << bits) - 1)


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[GptqTensor]:
    version = str(said.get("checkpoint_format") or "gptq")
    if version not in _VERSIONS:
        raise QuantError(
            f"the source is GPTQ packed for `{version}`, which is not read",
            f"read are the packings {', '.join(_VERSIONS)}",
        )
    for module in modules(stored, "qweight"):
        words, scales, zeros = (
            require(stored, f"{module}.{part}") for part in ("qweight", "scales", "qzeros")
        )
        if len(words.shape) != 2 or len(scales.shape) != 2 or len(zeros.shape) != 2:
            raise misfit(f"{module}.qweight", words.shape, "or its scales are no matrices")
        bits = zeros.shape[1] * WORD_BITS // max(1, scales.shape[1])
        if bits not in _BITS:
            raise QuantError(f"`{module}` has GPTQ weights of {bits} bits", "read are 4 and 8 bits")
        in_features = words.shape[0] * WORD_BITS // bits
        group_of = present(stored, module, "g_idx")
        yield GptqTensor(
            name=f"{module}.weight",
            dtype=scales.dtype,
            shape=(words.shape[1], in_features),
            parts=present(stored, module, "qweight", "qzeros", "scales", "g_idx"),
            bits=bits,
            group_size=-(-in_features // scales.shape[0]),
            group_of=group_of[0] if group_of else None,
            zero_offset=_VERSIONS[version],
        )


def _form(said: Mapping[str, Any]) -> str:
    return f"GPTQ {said.get('bits', 4)}-bit"


FORMAT = Format("gptq", "GPTQ (4 and 8 bits)", _packed_tensors, _form)
