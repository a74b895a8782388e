"""Knows how transformers builds a model without memory, and which of its modules are experts.

Legend: E experts of a layer, H hidden, I intermediate.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from moecli.errors import MoecliError
from moecli.models.hf_config import SUPPORTED_HINT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMOTE_HINT = "moecli runs no code that comes with a checkpoint, only what transformers contains"
# Families that the library knows and whose experts are of a kind that no scheme of ours holds.
_REFUSED = {
    "longcat_flash": "some of its experts are the identity, and have no weights",
    "nemotron_h": "its experts have no gate: up and down projection alone",
}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # of the library
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one layer, as the library keeps them."""

    name: str
    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    transposed: bool  # weights are [E, in, out] instead of [E, out, in]

    @property
    def parameters(self) -> tuple[str, str]:
        return f"{self.name}.gate_up_proj", f"{self.name}.down_proj"


def build(config: Mapping[str, Any], buffers: bool = True) -> "PreTrainedModel":
    """The model of a parsed config.json, in evaluation mode.

    Its parameters are on the meta device: shapes without memory. `buffers`: what it computes by
    itself, as frequencies of RoPE, is there; else that has shapes only, too. Raises MoecliError
    for what the library does not know, and for what it could only run with code from elsewhere.
    """
    from accelerate import init_empty_weights

    library_config = _library_config(config)
    model_class = _model_class(config, library_config)
    try:
        with init_empty_weights(include_buffers=True):
            model = model_class._from_config(library_config, dtype=torch.float32)
        if buffers:
            _compute_buffers(model)
    except FAILURES as error:
        kind = library_config.model_type
        raise MoecliError(
            f"transformers cannot build this `{kind}`: {error}", SUPPORTED_HINT
        ) from error
    return model.eval()


@torch.no_grad()
def _compute_buffers(model: "PreTrainedModel") -> None:
    """Buffers that no checkpoint has; the library computes them as it initialises weights.

    Building with buffers in memory would not do: experts that a constructor fills with zeros then
    are in memory too, for a moment, and that may be a hundred times what there is.
    """
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def _library_config(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        hint = _REMOTE_HINT if config.get("auto_map") else SUPPORTED_HINT
        raise MoecliError(
            f"neither moecli nor the installed transformers knows the model type `{kind}`", hint
        )
    if kind in _REFUSED:
        raise MoecliError(f"`{kind}` cannot be run by moecli: {_REFUSED[kind]}", SUPPORTED_HINT)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    config_class = CONFIG_MAPPING[kind]
    try:
        return config_class.from_dict(config_class._decode_special_floats(plain))
    except (*FAILURES, StrictDataclassError) as error:
        raise MoecliError(
            f"transformers cannot read this config.json of a `{kind}`: {error}",
            "download config.json again, or compare it with the one the model was released with",
        ) from error


def _model_class(config: Mapping[str, Any], library_config: Any) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if library_config.is_encoder_decoder:
        raise MoecliError(
            f"`{library_config.model_type}` has an encoder; moecli runs decoders alone",
            SUPPORTED_HINT,
        )
    for name in config.get("architectures") or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(library_config) in auto._model_mapping:
            return auto._model_mapping[type(library_config)]
    raise MoecliError(f"`{library_config.model_type}` is no model that writes text", SUPPORTED_HINT)


def experts_modules(model: "PreTrainedModel") -> tuple[ExpertsModule, ...]:
    """All experts of a model on the meta device, layer by layer.

    Raises MoecliError where there are none, or of a kind that moecli cannot compute, by name.
    """
    kind = type(model).__name__
    found = [_described(kind, name, module) for name, module in _interface_modules(model)]
    if not found:
        raise MoecliError(
            f"`{kind}` cannot be run by moecli: its experts, if it has any, are not what "
            "transformers calls by its common interface",
            SUPPORTED_HINT,
        )
    layers = [module.layer for module in found]
    if len(set(layers)) < len(layers):
        raise MoecliError(
            f"`{kind}` cannot be run by moecli: a layer of it has more than one set of experts",
            SUPPORTED_HINT,
        )
    sizes = {(m.num_experts, m.hidden_size, m.intermediate_size) for m in found}
    if len(sizes) > 1:
        raise MoecliError(
            f"`{kind}` cannot be run by moecli: its layers have experts of different sizes",
            SUPPORTED_HINT,
        )
    return tuple(sorted(found, key=lambda module: module.layer))


def _interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the library's `use_experts_implementation` has prepared."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "has_post_expert_norm"):
            yield name, module


def _described(kind: str, name: str, module: Any) -> ExpertsModule:
    reasons = {
        "they have no gate": not module.has_gate,
        "they have biases": module.has_bias,
        "their gate and up projections are interleaved": not module.is_concatenated,
        "they end in a norm": module.has_post_expert_norm,
    }
    parameters = dict(module.named_parameters())
    odd = [reason for reason, applies in reasons.items() if applies]
    if not odd and set(parameters) != {"gate_up_proj", "down_proj"}:
        odd = [f"they have the parameters {', '.join(sorted(parameters))}"]
    layer = LAYER.search(name)
    if layer is None:
        odd.append(f"`{name}` is in no numbered layer")
    if odd:
        raise MoecliError(
            f"the experts of `{kind}` cannot be run by moecli: {odd[0]}", SUPPORTED_HINT
        )
    assert layer is not None, "an experts module in no layer was let through"
    experts, out, inner = parameters["down_proj"].shape
    if module.is_transposed:
        out, inner = inner, out
    return ExpertsModule(name, int(layer[1]), experts, out, inner, module.is_transposed)
