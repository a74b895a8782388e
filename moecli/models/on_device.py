"""Knows which models the operations of a device cannot compute; none of these operations."""

from moecli.errors import MoecliError
from moecli.models.config import ModelSpec


def unknown_on_a_device(spec: ModelSpec) -> str | None:
    """What of this model the operations of a device do not know; None: nothing."""
    if spec.latent is not None:
        return "attention over latents"
    if spec.sinks:
        return "attention sinks"
    if any(layer.attention == "sliding" for layer in spec.layers):
        return "sliding windows"
    if spec.expert_bias or spec.expert_activation != "silu":
        return "biases of experts, or an activation that is not SiLU,"
    return None


def refusal(spec: ModelSpec) -> MoecliError | None:
    """Why a graphics card cannot run this model; None where it can."""
    unknown = unknown_on_a_device(spec)
    if unknown is None:
        return None
    return MoecliError(
        f"moecli cannot compute {unknown} on a graphics card yet, which {spec.family} has",
        "compute on the processor with `--device cpu`",
    )
