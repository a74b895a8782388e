"""Knows FP8 in blocks, as DeepSeek-V3 and Qwen3 are released: `P.weight` float8 [O, I] and
`P.weight_scale_inv`, which despite its name is what a block is multiplied with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.sources.packed import DAMAGED_HINT, Format, modules, of_activations, require
from quant.sources.scaled import ScaledTensor

_SCALE = "weight_scale_inv"


def _packed_tensors(stored: Checkpoint, said: Mapping[str, Any]) -> Iterator[ScaledTensor]:
    for module in modules(stored, _SCALE):
        name = f"{module}.weight"
        shape = require(stored, name).shape
        block = block_size(said.get("weight_block_size")) or shape
        parts = (name, f"{module}.{_SCALE}", *of_activations(stored, module))
        # transformers gives them the type of its parameters, which no model of the kind has wider.
        yield ScaledTensor(name, torch.bfloat16, shape, parts, parts[1], (block[0], block[-1]))


def block_size(value: Any) -> tuple[int, int] | None:
    """[rows, columns] as a config names them; None where there are no blocks."""
    if value is None:
        return None
    counts = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    if not counts or min(value) < 1:
        raise QuantError(f"blocks of {value!r:.40} in config.json make no sense", DAMAGED_HINT)
    return value[0], value[1]


def _form(said: Mapping[str, Any]) -> str:
    block = block_size(said.get("weight_block_size"))
    return "FP8" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"


FORMAT = Format("fp8", "FP8 (`fp8`, in blocks or whole)", _packed_tensors, _form)
