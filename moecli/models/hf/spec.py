"""Knows the sizes of a model of the library: what plans, conversions and engines ask of a spec."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moecli.models.config import DenseTensor
from moecli.models.hf.library import LAYER, ExpertsModule, build, experts_modules
from moecli.models.hf.loading import text_parameters
from moecli.models.hf.probe import Probe

_ITEMSIZE = 4  # activations are fp32
_GROUP = 128  # inner sizes that are no multiple of it stay in 16 bits


@dataclass(frozen=True)
class HfSpec:
    """A Mixture-of-Experts model that transformers computes, its routed experts excepted."""

    config: Mapping[str, Any] = field(repr=False)  # config.json
    modules: tuple[ExpertsModule, ...]  # by layer
    dense_tensors: tuple[DenseTensor, ...]  # of the text decoder, by the library's names
    architecture: str
    vocab_size: int
    num_layers: int
    experts_per_token: int
    max_context: int
    tie_word_embeddings: bool
    num_text_params: int  # needed to write text; a tied embedding counts once
    num_vision_params: int  # all others
    num_heads: int
    eager_attention: bool  # scores of all positions are in memory at once
    recurrent: bool  # some layers have a state, and take a prompt whole or token by token
    weight_on_input: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "HfSpec":
        """Raises MoecliError for what cannot be run, naming the reason."""
        model, probe = build(config), Probe(config)
        text = model.config.get_text_config()
        modules = experts_modules(model)
        needed = text_parameters(model)
        needed_params = _numel(model, needed)
        all_params = _numel(model, model.state_dict())
        return cls(
            config=config,
            modules=modules,
            dense_tensors=_dense_tensors(model, needed, modules),
            architecture=type(model).__name__,
            vocab_size=text.vocab_size,
            num_layers=text.num_hidden_layers,
            experts_per_token=probe.experts_per_token,
            max_context=text.max_position_embeddings,
            tie_word_embeddings=bool(model.all_tied_weights_keys),
            num_text_params=needed_params,
            num_vision_params=all_params - needed_params,
            num_heads=text.num_attention_heads,
            eager_attention=model.config._attn_implementation == "eager",
            recurrent=probe.recurrent,
        )

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(module.layer for module in self.modules)

    @property
    def num_experts(self) -> int:
        return self.modules[0].num_experts

    @property
    def hidden_size(self) -> int:
        return self.modules[0].hidden_size

    @property
    def expert_intermediate_size(self) -> int:
        return self.modules[0].intermediate_size

    @property
    def shared_intermediate_size(self) -> int:
        return 0

    @property
    def expert_numel(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def num_params(self) -> int:
        """All weights of the model, towers for other things than text included."""
        return self.num_text_params + self.num_vision_params

    @property
    def num_active_params(self) -> int:
        """Text weights less the experts that one token does not choose; embeddings count."""
        idle = self.num_experts - self.experts_per_token
        return self.num_text_params - len(self.moe_layers) * idle * self.expert_numel

    @cached_property
    def _probe(self) -> Probe:
        return Probe(self.config)

    def cache_nbytes(self, ctx: int, prefill_chunk: int) -> int:
        """Bytes that one sequence of `ctx` tokens keeps, keys and values and states, in fp32."""
        return self._probe.cache_nbytes(ctx, self.chunk_size(ctx, prefill_chunk))

    def chunk_size(self, ctx: int, prefill_chunk: int) -> int:
        """How many tokens of a prompt are read at once."""
        return ctx if self.recurrent else min(prefill_chunk, ctx)

    def workspace_nbytes(self, ctx: int, prefill_chunk: int) -> int:
        """Most bytes of activations that are alive at once while a chunk of prompt passes a layer.

        The library frees what it no longer needs; this counts as if a layer freed nothing: what
        its linears give, the choices' contributions twice, and an expert's inner activations.
        Attention adds its mask, and scores of all heads where it is not fused.
        """
        tokens = self.chunk_size(ctx, prefill_chunk)
        layers = Counter[str]()
        for tensor in self.dense_tensors:
            if tensor.linear and (layer := LAYER.search(tensor.name)):
                layers[layer[0]] += tensor.shape[0]
        a_token = 4 * self.hidden_size + max(layers.values(), default=0)
        a_token += 2 * self.experts_per_token * self.hidden_size + 3 * self.expert_intermediate_size
        scores = 2 * self.num_heads if self.eager_attention else 1
        logits = 2 * self.vocab_size
        return _ITEMSIZE * (tokens * (a_token + scores * ctx) + logits)


def is_linear(module: nn.Module, num_experts: int) -> bool:
    """Whether its weight may be quantized: a plain linear, and no router."""
    if type(module) is not nn.Linear or module.out_features in (1, num_experts):
        return False
    return module.in_features % _GROUP == 0


def _dense_tensors(
    model: PreTrainedModel, needed: Collection[str], modules: tuple[ExpertsModule, ...]
) -> tuple[DenseTensor, ...]:
    """What is needed and no expert; of what is tied, the first. `loading` says what is held how."""
    experts = {name for module in modules for name in module.parameters}
    tied, state = model.all_tied_weights_keys, model.state_dict()
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_linear(module, modules[0].num_experts)
    }
    stored = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
    }
    return tuple(
        DenseTensor(name, tuple(state[name].shape), name in linears, expanded=name not in stored)
        for name in needed
        if name not in experts and name not in tied
    )


def _numel(model: PreTrainedModel, names: Collection[str]) -> int:
    """Parameters of these names; what is tied counts once, a buffer not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = model.all_tied_weights_keys
    return sum(
        parameters[name].numel() for name in names if name in parameters and name not in tied
    )
