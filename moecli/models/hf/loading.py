"""Knows how a model of the library gets its weights from a checkpoint that moecli has written.

What the library renames or joins, it does itself; linears and the embedding keep their bytes.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moecli.errors import MoecliError
from moecli.models.hf.library import ExpertsModule
from moecli.models.hf.modules import RoutedExperts, StoredEmbedding, StoredLinear, replace
from moecli.models.hf.probing import Names
from moecli.models.provider import ExpertProvider
from quant.tensor import QuantizedWeight

_PACKED = ".weight_packed"
_BESIDE = (".weight_scale", ".weight_shape")  # what a packed weight has besides
Weight = QuantizedWeight | Tensor
Read = Callable[[str], Weight]


def dense_names(names: Collection[str], modules: Collection[ExpertsModule]) -> list[str]:
    """The tensors that are no experts, by the names that they have in the source."""
    prefixes = tuple(f"{module.name}." for module in modules)
    found = []
    for name in names:
        expert = name.startswith(prefixes) and name.endswith((_PACKED, *_BESIDE))
        if not expert and not name.endswith(_BESIDE):
            found.append(name.removesuffix("_packed") if name.endswith(_PACKED) else name)
    return found


def load(
    model: PreTrainedModel,
    modules: Collection[ExpertsModule],
    names: Collection[str],
    read: Read,
    provider: ExpertProvider,
) -> None:
    """Give `model`, which is on the meta device, `provider` for experts and all other weights.

    `names` are those of `dense_names`; `read` takes one of them. Raises MoecliError where
    something is missing.
    """
    known = Names(model, dict.fromkeys(names))
    for module in modules:
        replace(model, module.name, RoutedExperts(module.layer, module.num_experts, provider))
    values = _read_all(known, read, text_parameters(model))
    _tie(model, values)
    missing = [name for name in text_parameters(model) if name not in values]
    if missing:
        raise MoecliError(
            f"no tensor of the checkpoint becomes `{missing[0]}`",
            "the checkpoint is incomplete, or its config.json belongs to another",
        )
    for name, owner in list(model.named_modules()):
        _fill(model, name, owner, values)


def text_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and stored buffers that are needed to write text; not those of a vision tower."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    parts = {id(module) for module in (decoder, head)}
    prefixes = tuple(f"{name}." for name, part in model.named_modules() if id(part) in parts)
    state = model.state_dict()
    return {name: value for name, value in state.items() if name.startswith(prefixes)}


def _read_all(known: Names, read: Read, wanted: Collection[str]) -> dict[str, Weight]:
    values: dict[str, Weight] = {}
    for target in known.targets:
        sources = known.sources(target)
        found = {name: read(name) for name in sources} if target in wanted else {}
        quantized = [weight for weight in found.values() if isinstance(weight, QuantizedWeight)]
        if quantized:
            assert len(found) == 1, f"{target} is made of {len(found)} quantized weights"
            values[target] = quantized[0]
        elif found:
            floats = {name: value for name, value in found.items() if isinstance(value, Tensor)}
            values |= known.convert(target, floats)
    return values


def _tie(model: PreTrainedModel, values: dict[str, Weight]) -> None:
    """What a checkpoint stores once for two places."""
    ties = model.all_tied_weights_keys.items()
    for one, other in [*ties, *((other, one) for one, other in ties)]:
        if one not in values and other in values:
            values[one] = values[other]


def _fill(model: PreTrainedModel, name: str, owner: nn.Module, values: dict[str, Weight]) -> None:
    """Put the values of one module into it."""
    prefix = f"{name}." if name else ""
    weight = values.get(f"{prefix}weight")
    if weight is not None and type(owner) is nn.Linear:
        bias: Any = values.get(f"{prefix}bias")
        floats = None if bias is None else bias.float()
        replace(model, name, StoredLinear(weight, floats, owner.in_features))
        return
    if isinstance(weight, Tensor) and type(owner) is nn.Embedding:
        replace(model, name, StoredEmbedding(weight))
        return
    for key in [*owner._parameters, *owner._buffers]:
        value = values.get(prefix + key)
        if value is None:
            continue
        assert isinstance(value, Tensor), f"{prefix}{key} is quantized and no linear's"
        number = value.float() if value.is_floating_point() else value
        if key in owner._parameters:
            owner._parameters[key] = nn.Parameter(number, requires_grad=False)
        else:
            owner._buffers[key] = number
