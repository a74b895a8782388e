"""Knows how a model, its settings and a machine become the plan that is shown and executed."""

from dataclasses import dataclass, replace

from moecli.config import EngineConfig
from moecli.errors import MoecliError
from moecli.footprint import model_footprint
from moecli.models.config import ModelSpec
from moecli.models.outline import Counted
from moecli.schemes import Schemes
from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import MemoryPlan, ModelFootprint, plan_context


@dataclass(frozen=True)
class Question:
    """All that a plan follows from; `ctx` in tokens."""

    spec: Counted
    schemes: Schemes
    ctx: int
    config: EngineConfig
    machine: Machine

    def answer(self) -> MemoryPlan:
        """What would lie where, of models too that moecli cannot run there: see `refusal`.

        Raises OffloadError where that does not fit; the hint says what would.
        """
        return _proposed(self.spec, self.schemes, self.ctx, self.config, self.machine)


def plan_model(
    spec: Counted,
    schemes: Schemes,
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    """The plan of a model whose experts and dense weights are stored in `schemes`.

    It is one for a graphics card where the settings grant VRAM, or `machine` has a card and the
    settings allow it. Raises OffloadError when that does not fit; the hint says what would; and
    MoecliError for what a card cannot do.
    """
    plan = _proposed(spec, schemes, ctx, config, machine)
    refused = refusal(spec, config, plan)
    if refused is not None:
        raise refused
    return plan


def refusal(spec: Counted, config: EngineConfig, plan: MemoryPlan) -> MoecliError | None:
    """Why moecli cannot run a plan that fits; None where it can."""
    if plan.on_device and config.kv_dtype == "int8":
        return MoecliError(
            "graphics cards do not read a KV cache in int8 yet",
            "leave out `--kv-dtype`, or compute on the processor with `--device cpu`",
        )
    if not isinstance(spec, ModelSpec):
        return None
    if spec.latent is not None and config.kv_dtype == "int8":
        return MoecliError(
            "the KV cache of this model keeps latents, which moecli does not round to int8",
            "leave out `--kv-dtype`: latents are small already",
        )
    return None


def _proposed(
    spec: Counted,
    schemes: Schemes,
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    if config.placement == "lru" and spec.experts_per_token == spec.num_experts:
        raise MoecliError(
            "every token takes all experts here: slots that change by use would never hit",
            "give `--placement pinned`, or leave it out",
        )
    try:
        return _plan(spec, schemes, ctx, config, machine)
    except OffloadError as error:
        smaller = replace(config, dense_scheme="nf4")
        if config.dense_scheme != "stored" or not _fits(spec, schemes, ctx, smaller, machine):
            raise
        hint = "`--dense-scheme nf4` fits"
        raise OffloadError(
            error.message, hint if error.hint is None else f"{hint}; or {error.hint}"
        ) from error


def _plan(
    spec: Counted,
    schemes: Schemes,
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    if not config.pictures and isinstance(spec, ModelSpec):
        spec = replace(spec, vision=None)

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
    spec: Counted,
    schemes: Schemes,
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> bool:
    try:
        return _plan(spec, schemes, ctx, config, machine).on_device
    except OffloadError:
        return False
