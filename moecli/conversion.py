"""Joins the names of a model with the converter: from a checkpoint to a quantized one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecli.errors import MoecliError
from moecli.hub.selection import COMPANIONS
from moecli.models.config import ModelSpec
from moecli.models.hf_config import BITSANDBYTES, source_scheme
from moecli.models.naming import plan_conversion
from quant.bnb_source import open_source
from quant.convert import (
    ConversionJob,
    ConversionResult,
    ProgressCallback,
    convert,
    quantization_config,
)
from quant.scheme import QuantScheme


def quantize_model(
    source: Path,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Quantize the checkpoint in `source` to `out`, or take up what was interrupted.

    Routed experts take `scheme`; attention, shared experts and an untied head `dense_scheme`, or
    16 bits with None. The source has 16 bits itself, or was quantized with bitsandbytes. Raises
    MoecliError and QuantError for anything wrong with the source, and QuantError when `out` exists
    or cannot be written; what was finished then stays for a next try.
    """
    checkpoint = open_source(source)
    scheme_there = source_scheme(checkpoint.config)
    if scheme_there is not None and not scheme_there.startswith(BITSANDBYTES):
        raise MoecliError(
            f"`{source}` is quantized already ({scheme_there})",
            "start from the 16-bit checkpoint, or from one quantized with bitsandbytes",
        )
    config = _without_quantization(checkpoint.config)
    spec = ModelSpec.from_hf(config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    conversion = plan_conversion(spec, shapes, dense_scheme)
    config["quantization_config"] = quantization_config(scheme, dense_scheme, conversion.ignore)
    job = ConversionJob(
        source=checkpoint,
        out=out,
        scheme=scheme,
        dense_scheme=dense_scheme,
        experts=conversion.experts,
        dense=conversion.dense,
        config=config,
        extra_files=tuple(name for name in COMPANIONS if (source / name).is_file()),
    )
    return convert(job, progress)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same weights in floats: parts of a multimodal one may say it again."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
