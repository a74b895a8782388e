"""Knows compressed-tensors: integers packed in words, which moecli writes too, and FP8 or INT8 one
number an element. `config_groups` says by the names of modules which of them has how many bits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint, TensorInfo
from quant.errors import QuantError
from quant.sources.fp8 import block_size
from quant.sources.packed import (
    DAMAGED_HINT,
    Format,
    PackedTensor,
    misfit,
    modules,
    of_activations,
    present,
    require,
)
from quant.sources.scaled import ScaledTensor

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_BITS = (4, 8)
_WORD_BITS = 32
_LINEAR = "Linear"


@dataclass(frozen=True)
class WordsTensor(PackedTensor):
    """value = (code - zero point) * scale, codes packed along the inputs, lowest bits first, and
    zero points along the outputs. `parts` begins with `P.weight_packed`.
    """

    bits: int
    group_size: int
    zero_point: str | None
    group_of: str | None  # the tensor that names the group of each input, in any order

    @property
    def per_word(self) -> int:
        return _WORD_BITS // self.bits

    def check(self, stored: Checkpoint) -> None:
        out_features, in_features = self.shape
        groups = in_features // self.group_size
        packed, scale = (require(stored, part) for part in self.parts[:2])
        if packed.dtype != torch.int32 or len(packed.shape) != 2:
            raise misfit(self.parts[0], packed.shape, "is no matrix of int32")
        whole = groups == 1 and scale.shape in ((), (1,))
        fits = whole or scale.shape == (out_features, groups)
        if not fits or not scale.dtype.is_floating_point:
            raise misfit(self.parts[1], scale.shape, f"is no scale for groups of {self.group_size}")
        if self.zero_point is not None:
            zero = stored.info(self.zero_point)
            rows = -(-out_features // self.per_word) if zero.dtype == torch.int32 else out_features
            if zero.shape != (rows, groups) or zero.dtype not in (torch.int32, torch.int8):
                raise misfit(self.zero_point, zero.shape, f"does not go with `{self.parts[1]}`")
        if self.group_of is not None and stored.info(self.group_of).shape != (in_features,):
            shape = stored.info(self.group_of).shape
            raise misfit(self.group_of, shape, f"names no group for {in_features} inputs")

    def rows(self, stored: Checkpoint, start: int, stop: int) -> Tensor:
        codes = self._unpacked(stored.read_rows(self.parts[0], start, stop)).float()  # [r, I]
        if len(stored.info(self.parts[1]).shape) < 2:
            scale = stored.read(self.parts[1]).float().view(1, 1)
        else:
            scale = stored.read_rows(self.parts[1], start, stop).float()  # [r, G]
        zero = self._zero_points(stored, start, stop)
        if self.group_of is not None:
            group = self._groups(stored)
            codes -= 0 if zero is None else zero[:, group]
            return codes.mul_(scale[:, group]).to(self.dtype)
        grouped = codes.view(stop - start, -1, self.group_size)  # [r, G, g]
        if zero is not None:
            grouped -= zero.unsqueeze(-1)
        return grouped.mul_(scale.unsqueeze(-1)).to(self.dtype).view(stop - start, -1)

    def _unpacked(self, words: Tensor) -> Tensor:
        """int8 [r, columns] of words [r, columns / per_word]."""
        words = words.clone(memory_format=torch.contiguous_format)
        octets = words.view(torch.uint8)
        if self.bits == 4:
            octets = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
        return (octets.view(torch.int8) - 8) if self.bits == 4 else (octets ^ 128).view(torch.int8)

    def _zero_points(self, stored: Checkpoint, start: int, stop: int) -> Tensor | None:
        """fp32 [r, G]; None where codes have their zero in the middle."""
        if self.zero_point is None:
            return None
        if stored.info(self.zero_point).dtype == torch.int8:
            return stored.read_rows(self.zero_point, start, stop).float()
        first, last = start // self.per_word, -(-stop // self.per_word)
        words = stored.read_rows(self.zero_point, first, last).t()
        begin = start - first * self.per_word
        return self._unpacked(words).t()[begin : begin + stop - start].float()

    def _groups(self, stored: Checkpoint) -> Tensor:
        assert self.group_of is not None, "inputs are in order"
        groups = stored.read(self.group_of).long()
        count = self.shape[1] // self.group_size
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise misfit(
                self.group_of, tuple(groups.shape), f"names groups beyond 0 to {count - 1}"
            )
        return groups


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[PackedTensor]:
    _check_formats(stored, said)
    for module in modules(stored, "weight_packed"):
        yield _in_words(stored, said, module)
    for module in modules(stored, "weight_scale"):
        if f"{module}.weight_packed" not in stored.tensors:
            yield _scaled(stored, said, module)


def _check_formats(stored: Checkpoint, said: Mapping[str, Any]) -> None:
    names = {str(group.get("format") or said.get("format")) for group in _groups_of(said)}
    for name in sorted(names - set(_FORMATS)):
        raise QuantError(
            f"the source is compressed-tensors `{name}`, which is not read",
            f"read are {', '.join(_FORMATS)}",
        )


def _in_words(stored: Checkpoint, said: Mapping[str, Any], module: str) -> WordsTensor:
    weights = _weights_of(said, module)
    bits = weights.get("num_bits")
    if bits not in _BITS:
        raise QuantError(f"`{module}` has integers of {bits} bits", "read are 4 and 8 bits")
    packed, scale = (
        require(stored, f"{module}.{part}") for part in ("weight_packed", "weight_scale")
    )
    if len(packed.shape) != 2:
        raise misfit(f"{module}.weight_packed", packed.shape, "is no matrix of int32")
    in_features = packed.shape[1] * _WORD_BITS // bits
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if not groups or in_features % groups:
        raise misfit(f"{module}.weight_scale", scale.shape, f"does not divide {in_features} inputs")
    zero, group_of = (
        next(iter(present(stored, module, part)), None)
        for part in ("weight_zero_point", "weight_g_idx")
    )
    optional = ("weight_shape", "weight_zero_point", "weight_g_idx")
    return WordsTensor(
        name=f"{module}.weight",
        dtype=scale.dtype,
        shape=(packed.shape[0], in_features),
        parts=(
            *(f"{module}.weight_packed", f"{module}.weight_scale"),
            *present(stored, module, *optional),
            *of_activations(stored, module),
        ),
        bits=bits,
        group_size=in_features // groups,
        zero_point=zero,
        group_of=group_of,
    )


def _scaled(stored: Checkpoint, said: Mapping[str, Any], module: str) -> ScaledTensor:
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    codes, scales = require(stored, name), stored.info(scale)
    zero = present(stored, module, "weight_zero_point")
    return ScaledTensor(
        name=name,
        dtype=scales.dtype,
        shape=codes.shape,
        parts=(name, scale, *zero, *of_activations(stored, module)),
        scale=scale,
        block=_block(_weights_of(said, module), codes, scales),
        zero_point=zero[0] if zero else None,
    )


def _block(weights: Mapping[str, Any], codes: TensorInfo, scale: TensorInfo) -> tuple[int, int]:
    """What one scale is for, [rows, columns]."""
    rows, columns = codes.shape[0], codes.shape[-1]
    if weights.get("strategy") == "block":
        return block_size(weights.get("block_structure")) or (rows, columns)
    if len(scale.shape) < 2:
        return rows, columns
    return 1, -(-columns // max(1, scale.shape[1]))


def _weights_of(said: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What is said of a module's weights. Names go before the class, as in the library."""
    groups = _groups_of(said)
    for group in groups:
        if any(_names(target, module) for target in group["targets"]):
            return _weights(group, module)
    for group in groups:
        if _LINEAR in group["targets"]:
            return _weights(group, module)
    raise QuantError(f"no group of `quantization_config` is meant for `{module}`", DAMAGED_HINT)


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _weights(group: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise QuantError(
            f"`quantization_config` says nothing of weights of `{module}`", DAMAGED_HINT
        )
    return weights


def _groups_of(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = said.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    well = all(isinstance(g, Mapping) and isinstance(g.get("targets"), list) for g in found)
    if not found or not well:
        raise QuantError("`config_groups` of `quantization_config` make no sense", DAMAGED_HINT)
    return found


def _form(said: Mapping[str, Any]) -> str:
    kinds = {
        f"{str(weights.get('type', 'int')).upper().replace('FLOAT', 'FP')}{weights.get('num_bits')}"
        for group in _groups_of(said)
        if isinstance(weights := group.get("weights"), Mapping)
    }
    return f"compressed-tensors {' and '.join(sorted(kinds))}"


FORMAT = Format(
    "compressed-tensors",
    f"compressed-tensors ({', '.join(_FORMATS)})",
    _packed_tensors,
    _form,
)
