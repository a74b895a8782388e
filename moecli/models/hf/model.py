"""Knows how a model of the library is opened over a checkpoint that moecli has written."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moecli.gated import Gate
from moecli.models.facts import LibraryFacts
from moecli.models.hf.cache import HfCache
from moecli.models.hf.decoder import HfDecoder
from moecli.models.hf.library import ExpertsModule, build
from moecli.models.hf.loading import Read, dense_names, load
from moecli.models.hf.spec import HfSpec
from moecli.models.provider import ExpertProvider


class LibraryModel:
    """What a run on the processor asks of a model: its decoder and its caches."""

    def __init__(self, spec: LibraryFacts, names: Collection[str], read: Read, ctx: int) -> None:
        """`names`: all tensors of the checkpoint; `read` gives one that is no expert."""
        assert isinstance(spec, HfSpec), f"{spec.architecture} is no model of the library"
        self._spec, self._ctx = spec, ctx
        self._names, self._read = dense_names(names, spec.modules), read
        self._model = build(spec.config)
        self.gates = gates(self._model, spec.modules)
        self.biases: Mapping[int, Tensor] = {}  # families with some are our own decoder's
        self.activation = "silu"

    def decoder(self, experts: ExpertProvider, reads_ahead: bool) -> HfDecoder:
        """Called once. What the library computes tells nobody of the next layer's experts."""
        load(self._model, self._spec.modules, self._names, self._read, experts)
        return HfDecoder(self._model)

    def new_cache(self) -> HfCache:
        return HfCache(self._ctx)


def gates(model: PreTrainedModel, modules: Collection[ExpertsModule]) -> Mapping[int, Gate]:
    """By layer, what stands between an expert's products where that is not SiLU(gate) * up."""
    found: dict[int, Gate] = {}
    for module in modules:
        experts: Any = model.get_submodule(module.name)
        if not _is_silu(experts):
            found[module.layer] = experts._apply_gate
    return found


def _is_silu(experts: Any) -> bool:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    plain = type(experts)._apply_gate is _default_apply_gate
    return plain and isinstance(experts.act_fn, SiLUActivation | nn.SiLU)
