"""Knows what GPTQ and AWQ share: codes [I, O] packed in words, with zero points and scales of
groups of inputs, [G, O]. How words are packed they know themselves.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.sources.packed import PackedTensor, misfit, require

WORD_BITS = 32
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class InputMajorTensor(PackedTensor):
    """value = (code - zero point) * scale, computed in fp32 and rounded once.

    `parts`: qweight, qzeros, scales, and g_idx where there is one.
    """

    bits: int
    group_size: int
    group_of: str | None  # the tensor that names the group of each input, in any order

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    @abstractmethod
    def qweight_shape(self) -> tuple[int, int]:
        """Of the words with codes."""

    @abstractmethod
    def codes(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        """int32 [I, stop - start], of these outputs, which begin and end with words."""

    @abstractmethod
    def zero_points(self, words: Tensor) -> Tensor:
        """int32 [G, r] of words [G, r / per_word]."""

    def check(self, stored: Checkpoint) -> None:
        out_features, in_features = self.shape
        groups = -(-in_features // self.group_size)
        module = self.name.removesuffix(".weight")
        expected: dict[str, tuple[int, int]] = {
            "qweight": self.qweight_shape(),
            "qzeros": (groups, out_features // self.per_word),
            "scales": (groups, out_features),
        }
        for ending, shape in expected.items():
            name = f"{module}.{ending}"
            info = require(stored, name)
            kinds = _SCALES if ending == "scales" else (torch.int32,)
            if info.shape != shape or info.dtype not in kinds:
                raise misfit(name, info.shape, f"is not {list(shape)} of {kinds[0]}")
        if self.group_of is not None:
            found = stored.info(self.group_of).shape
            if found != (in_features,):
                raise misfit(self.group_of, found, f"names no group for {in_features} inputs")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        first, last = start // self.per_word, -(-stop // self.per_word)
        begin, end = first * self.per_word, last * self.per_word
        module = self.name.removesuffix(".weight")
        codes = self.codes(stored, begin, end)  # [I, r]
        zero = self.zero_points(stored.read_columns(f"{module}.qzeros", first, last))  # [G, r]
        scale = stored.read_columns(f"{module}.scales", begin, end).float()  # [G, r]
        group = self._groups(stored)  # [I]
        values = codes.sub_(zero[group]).float().mul_(scale[group]).to(self.dtype)
        return values[:, start - begin : stop - begin].t().contiguous()

    def _groups(self, stored: Checkpoint) -> Tensor:
        if self.group_of is None:
            return torch.arange(self.shape[1]) // self.group_size
        groups = stored.read(self.group_of).long()
        last = -(-self.shape[1] // self.group_size) - 1
        if int(groups.min()) < 0 or int(groups.max()) > last:
            raise misfit(self.group_of, tuple(groups.shape), f"names groups beyond 0 to {last}")
        return groups
