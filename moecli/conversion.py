"""Joins the names of a model with the converter: from a checkpoint to a quantized one.

The checkpoint lies in a directory, or comes from the hub while it is converted.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moecli.hub.client import Caller
from moecli.hub.selection import COMPANIONS
from moecli.models.config import ModelSpec
from moecli.models.facts import ModelFacts, read_facts
from moecli.models.hf_config import without_prediction
from moecli.models.naming import Conversion, Shapes, plan_conversion
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.job import (
    SOURCE_DIRECTORY,
    ConversionJob,
    ConversionResult,
    ProgressCallback,
    partial_of,
)
from quant.pack_quantized import quantization_config
from quant.scheme import QuantScheme
from quant.sources.opening import open_source, unpacked
from quant.supply import AllThere, Supply

Notify = Callable[[str], None]


def _say_nothing(message: str) -> None:
    pass


def quantize_model(
    source: Path,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    progress: ProgressCallback | None = None,
    notify: Notify = _say_nothing,
) -> ConversionResult:
    """Quantize the checkpoint in `source` to `out`, or take up what was interrupted.

    Routed experts take `scheme`; attention, shared experts and an untied head `dense_scheme`, or
    16 bits with None. The source has 16 bits itself, or is packed in one of the forms of
    quant.sources. `notify` hears what of it is left out. Raises MoecliError and QuantError for
    anything wrong with the source, and QuantError when `out` exists or cannot be written; what was
    finished then stays for a next try.
    """
    return convert(local_job(source, out, scheme, dense_scheme, notify), progress)


def local_job(
    source: Path,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    notify: Notify = _say_nothing,
) -> ConversionJob:
    """What quantize_model does."""
    return _job(open_source(source), out, scheme, dense_scheme, AllThere(), notify)


def quantize_from_hub(
    repo_id: str,
    revision: str | None,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    caller: Caller,
    progress: ProgressCallback | None = None,
    arrived: Callable[[int], None] = lambda nbytes: None,
    notify: Notify = _say_nothing,
) -> ConversionResult:
    """As quantize_model, of a repository of the hub, file by file while it comes.

    The disk holds the result and one file of the source at most. `arrived` is told how many bytes
    have come, `notify` what is left out. What was interrupted goes on with the commit it began
    with, unless a revision is given. Raises MoecliError too where the hub does not give what is
    needed.
    """
    job = hub_job(repo_id, revision, out, scheme, dense_scheme, caller, arrived, notify)
    return convert(job, progress)


def hub_job(
    repo_id: str,
    revision: str | None,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    caller: Caller,
    arrived: Callable[[int], None] = lambda nbytes: None,
    notify: Notify = _say_nothing,
) -> ConversionJob:
    """What quantize_from_hub does; headers and small files have come."""
    from moecli.hub.pulling import weights_of
    from moecli.hub.streaming import HubSupply, open_remote, pinned

    directory = partial_of(out) / SOURCE_DIRECTORY
    repository = pinned(repo_id, revision, directory, caller)
    checkpoint = unpacked(open_remote(repository, directory, caller))
    names = weights_of(repository, checkpoint.path)
    supply = HubSupply(repository, names, directory, caller, arrived)
    return _job(checkpoint, out, scheme, dense_scheme, supply, notify)


def _job(
    checkpoint: Checkpoint,
    out: Path,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    supply: Supply,
    notify: Notify,
) -> ConversionJob:
    config = _without_quantization(checkpoint.config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    facts = read_facts(config)
    conversion = _conversion(facts, shapes, dense_scheme)
    if conversion.left_out:
        config = without_prediction(config)
        notify(
            f"layers beyond the model's {facts.num_layers} are left out "
            f"({len(conversion.left_out)} tensors): they guess later tokens than the next (MTP), "
            "which moecli does not do"
        )
    config["quantization_config"] = quantization_config(
        scheme, dense_scheme, conversion.ignore, conversion.expert_targets
    )
    return ConversionJob(
        source=checkpoint,
        out=out,
        scheme=scheme,
        dense_scheme=dense_scheme,
        experts=conversion.experts,
        dense=conversion.dense,
        config=config,
        extra_files=tuple(name for name in COMPANIONS if (checkpoint.path / name).is_file()),
        supply=supply,
    )


def _conversion(spec: ModelFacts, shapes: Shapes, dense_scheme: QuantScheme | None) -> Conversion:
    if isinstance(spec, ModelSpec):
        return plan_conversion(spec, shapes, dense_scheme)
    from moecli.models.hf.conversion import plan_library_conversion

    return plan_library_conversion(spec, shapes, dense_scheme)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same weights in floats: parts of a multimodal one may say it again."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
