"""Knows how a model, its settings and a machine become the plan that is shown and executed."""

from dataclasses import replace

from moecli.config import EngineConfig
from moecli.errors import MoecliError
from moecli.footprint import model_footprint
from moecli.models.config import ModelSpec
from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import MemoryPlan, ModelFootprint, plan_context
from quant.scheme import QuantScheme


def plan_model(
    spec: ModelSpec,
    schemes: tuple[QuantScheme, QuantScheme | None],
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    """The plan of a model whose experts and dense weights are stored in `schemes`.

    It is one for a graphics card where the settings grant VRAM, or `machine` has a card and the
    settings allow it. Raises OffloadError when that does not fit; the hint says what would; and
    MoecliError for what a card cannot do.
    """
    if spec.latent is not None and config.kv_dtype == "int8":
        raise MoecliError(
            "the KV cache of this model keeps latents, which moecli does not round to int8",
            "leave out `--kv-dtype`: latents are small already",
        )
    try:
        plan = _plan(spec, schemes, ctx, config, machine)
    except OffloadError as error:
        smaller = replace(config, dense_scheme="nf4")
        if config.dense_scheme != "stored" or not _fits(spec, schemes, ctx, smaller, machine):
            raise
        hint = "`--dense-scheme nf4` fits"
        raise OffloadError(
            error.message, hint if error.hint is None else f"{hint}; or {error.hint}"
        ) from error
    if plan.on_device and config.kv_dtype == "int8":
        raise MoecliError(
            "graphics cards do not read a KV cache in int8 yet",
            "leave out `--kv-dtype`, or compute on the processor with `--device cpu`",
        )
    return plan


def _plan(
    spec: ModelSpec,
    schemes: tuple[QuantScheme, QuantScheme | None],
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    def footprint_at(tokens: int) -> ModelFootprint:
        chunk, run_scheme = config.prefill_chunk, config.dense_scheme
        return model_footprint(spec, *schemes, tokens, chunk, run_scheme, config.kv_dtype)

    vram = 0 if config.device == "cpu" else config.vram_nbytes
    return plan_context(
        *(footprint_at, machine, ctx, config.ram_nbytes, vram),
        placement=config.placement,
        lane=config.lane,
    )


def _fits(
    spec: ModelSpec,
    schemes: tuple[QuantScheme, QuantScheme | None],
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> bool:
    try:
        return _plan(spec, schemes, ctx, config, machine).on_device
    except OffloadError:
        return False
