"""Knows what a model is made of as far as it can be counted; no HF names, no forward pass.

A plan takes no more: so models can be planned as our own decoder would run them that it does not
know. Of those that it knows the ModelSpec counts, whose names these are.
"""

from dataclasses import dataclass
from functools import cached_property

from moecli.models.config import DenseTensor, ModelSpec
from moecli.models.facts import LibraryFacts


@dataclass(frozen=True)
class LayerOutline:
    """One decoder layer. `tensors` are all outside the routed experts, named within the layer."""

    tensors: tuple[DenseTensor, ...]
    moe: bool
    kv_numel: int  # numbers that a token leaves in the cache
    kv_vectors: int  # which are so many vectors
    window: int | None = None  # tokens that the cache holds at most; None: all


@dataclass(frozen=True)
class Outline:
    """A decoder by its sizes. A dense one has one expert a layer, its MLP, that all tokens take."""

    architecture: str  # as config.json names it
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # the widest that a head has
    layers: tuple[LayerOutline, ...]
    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    dense_intermediate_size: int  # of layers without experts; 0 when there are none
    tie_word_embeddings: bool
    max_context: int
    expert_bias: bool = False  # of the three projections of an MLP
    num_vision_params: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.moe)

    @property
    def expert_bias_numel(self) -> int:
        return self.expert_bias * (2 * self.expert_intermediate_size + self.hidden_size)

    @property
    def expert_numel(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.expert_intermediate_size + self.expert_bias_numel

    @cached_property
    def dense_tensors(self) -> tuple[DenseTensor, ...]:
        """Every tensor outside the routed experts, in the order in which a token meets them."""
        embed = DenseTensor("embed_tokens", (self.vocab_size, self.hidden_size))
        head = DenseTensor("lm_head", (self.vocab_size, self.hidden_size), linear=True)
        layers = [
            DenseTensor(f"layers.{index}.{tensor.name}", tensor.shape, tensor.linear)
            for index, layer in enumerate(self.layers)
            for tensor in layer.tensors
        ]
        norm = DenseTensor("norm", (self.hidden_size,))
        return (embed, *layers, norm, *(() if self.tie_word_embeddings else (head,)))

    @property
    def num_text_params(self) -> int:
        """Weights of the text decoder; a tied embedding counts once."""
        experts = len(self.moe_layers) * self.num_experts * self.expert_numel
        return sum(tensor.numel for tensor in self.dense_tensors) + experts

    @property
    def num_params(self) -> int:
        return self.num_text_params + self.num_vision_params

    @property
    def num_active_params(self) -> int:
        """Text weights less the experts that one token does not choose; embeddings count."""
        idle = self.num_experts - self.experts_per_token
        return self.num_text_params - len(self.moe_layers) * idle * self.expert_numel

    def kv_capacity(self, layer: int, ctx: int) -> int:
        """Tokens that `layer` holds at a context of `ctx`."""
        window = self.layers[layer].window
        return ctx if window is None else min(ctx, window)

    def kv_nbytes(self, ctx: int, itemsize: int, scale_itemsize: int = 0) -> int:
        """Bytes of a cache of `ctx` tokens, `itemsize` a number and `scale_itemsize` a vector."""
        return sum(
            self.kv_capacity(index, ctx)
            * (layer.kv_numel * itemsize + layer.kv_vectors * scale_itemsize)
            for index, layer in enumerate(self.layers)
        )


Own = ModelSpec | Outline  # what is, or would be, computed by our own decoder
Counted = Own | LibraryFacts  # what a plan is made from
