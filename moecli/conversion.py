"""Joins the names of a model with the converter: from a 16-bit checkpoint to a quantized one."""

from collections.abc import Callable
from pathlib import Path

from moecli.models.config import ModelSpec
from moecli.models.naming import plan_conversion
from quant.checkpoint import Checkpoint
from quant.convert import (
    ConversionJob,
    ConversionProgress,
    ConversionResult,
    convert,
    quantization_config,
)
from quant.scheme import QuantScheme
