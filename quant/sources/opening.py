"""Knows which formats of packed weights are read, and finds that of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.checkpoint import Checkpoint
from quant.errors import QuantError
from quant.shards import FILLER_PREFIX
from quant.sources import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from quant.sources.packed import PackedCheckpoint

FORMATS = {
    format.method: format
    for format in (
        *(bitsandbytes.FORMAT, compressed_tensors.FORMAT, fp8.FORMAT),
        *(mxfp4.FORMAT, gptq.FORMAT, awq.FORMAT),
    )
}


def open_source(path: Path) -> Checkpoint:
    """The checkpoint in a directory, to convert from: with floats wherever weights are packed.

    Raises QuantError where something is missing, damaged, pickled or packed in an unknown way.
    """
    return unpacked(Checkpoint.open(path))


def unpacked(stored: Checkpoint) -> Checkpoint:
    """A checkpoint that looks unquantized; itself where it is. Raises as `open_source` does."""
    said = _said(stored.config)
    # Checkpoints of bitsandbytes are known by their tensors: old configs do not name the method.
    method = str((said or {}).get("quant_method", bitsandbytes.FORMAT.method))
    if method not in FORMATS:
        raise QuantError(
            f"the source is quantized with `{method}`, which is not read",
            f"read are weights of 16 bits, {', '.join(f.title for f in FORMATS.values())}",
        )
    known = FORMATS[method]
    packed = list(known.packed_tensors(stored, said or {}))
    if packed:
        return PackedCheckpoint.of(_without_fillers(stored), packed, known.form(said or {}))
    if said is not None:
        raise QuantError(
            f"config.json says that weights are `{method}`, and none of the tensors is",
            "config.json and weights do not belong together; download both again",
        )
    return stored


def _said(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config`, of the whole or of its text model; None where there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and part.get("quantization_config") is not None:
            said = part["quantization_config"]
            return said if isinstance(said, Mapping) else {"quant_method": str(said)}
    return None


def _without_fillers(stored: Checkpoint) -> Checkpoint:
    """Of what moecli has written: the next result gets its own."""
    tensors = {n: info for n, info in stored.tensors.items() if not n.startswith(FILLER_PREFIX)}
    return replace(stored, tensors=tensors)
