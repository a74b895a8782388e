"""Knows what a text decoder is made of and how it differs from the others; no HF names, no tensors.

Legend of the shapes: T tokens, H hidden, D head size, E experts, I intermediate, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

AttentionKind = Literal["full", "chunked", "sliding", "latent"]
RopeKind = Literal["interleaved", "half"]
QkNorm = Literal["none", "weighted_before_rope", "weightless_after_rope"]
RouterKind = Literal["softmax", "sigmoid", "grouped", "softmax_of_chosen"]
ExpertActivation = Literal["silu", "clamped_swiglu"]


@dataclass(frozen=True)
class RopeScaling:
    """llama3 scaling: wavelengths beyond `original_context` / `low` are divided by `factor`."""

    factor: float
    low: float
    high: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """Pairs that turn less than `slow` times in `original_context` turn `factor` times slower.

    Those that turn more than `fast` times keep their speed; in between the two are blended.
    """

    factor: float
    fast: float
    slow: float
    original_context: int
    magnitude: float  # by which turned queries and keys are multiplied
    whole_pairs: bool = True  # the blend begins and ends at a pair, not between two


@dataclass(frozen=True)
class RopeSpec:
    """Which components turn together (neighbours, or one of each half), and how fast."""

    kind: RopeKind
    theta: float
    scaling: RopeScaling | YarnScaling | None = None


@dataclass(frozen=True)
class TemperatureSpec:
    """Queries of layers without RoPE are scaled by 1 + scale * ln(1 + floor((pos + 1) / floor))."""

    floor: float
    scale: float


@dataclass(frozen=True)
class GroupedRouting:
    """Experts are chosen by sigmoid and a learned correction, in some groups of them alone."""

    num_groups: int  # of as many experts each; 1: no groups
    groups_per_token: int
    scale: float  # by which weights are multiplied in the end


@dataclass(frozen=True)
class LatentSpec:
    """Keys and values that all heads share as one latent a token, and a part of a key with RoPE."""

    rank: int  # numbers of a latent
    query_rank: int  # numbers that queries are made of; 0: made of the hidden state itself
    nope_size: int  # of a head's query and key, without RoPE
    rope_size: int  # of a head's query, and of the key that all heads share
    value_size: int  # of a head's value
    scale: float  # of the scores

    @property
    def head_size(self) -> int:
        """Numbers of a head's query, and of its key where that is expanded."""
        return self.nope_size + self.rope_size

    @property
    def padded_size(self) -> int:
        """Numbers of an expanded key or value: attention wants both of one size."""
        return max(self.head_size, self.value_size)

    @property
    def kept_size(self) -> int:
        """Numbers that the KV cache keeps a token."""
        return self.rank + self.rope_size


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer does."""

    attention: AttentionKind
    rope: bool
    moe: bool


@dataclass(frozen=True)
class DenseTensor:
    """A tensor outside the routed experts, by our own name; `linear`: fit to be quantized.

    `exact`: fp32, wherever its source is. `expanded`: held in fp32, however it is stored.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False
    exact: bool = False
    expanded: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


MOST_TILES = 16  # that a picture is divided into, the one of the whole picture not counted


@dataclass(frozen=True)
class VisionSpec:
    """A vision tower: what it makes of a tile, and the sizes that its memory follows from."""

    patch_token_id: int  # of the tokens whose places its results take
    tile_size: int  # pixels of a side
    patch_size: int
    shuffle_ratio: float  # of the result's sides to those of the grid of patches
    num_layers: int
    hidden_size: int
    intermediate_size: int
    adapter_sizes: tuple[int, int, int]  # into it, between its linears, out of it

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.tile_size // self.patch_size) ** 2

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile takes in a prompt."""
        return int(self.patches * self.shuffle_ratio**2)


@dataclass(frozen=True)
class ModelSpec:
    """A Mixture-of-Experts text decoder; families differ in these data only."""

    architecture: str  # as config.json names it
    family: str  # key of the name tables in moecli.models.naming
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    dense_intermediate_size: int  # of layers without experts; 0 when there are none
    router: RouterKind
    normalize_topk: bool  # the chosen experts' weights are made to sum to one
    weight_on_input: bool  # Expert(w * x) instead of w * Expert(x)
    rope: RopeSpec
    qk_norm: QkNorm
    attention_bias: bool
    chunk_size: int | None  # tokens of an absolute chunk; None: no layer is chunked
    temperature: TemperatureSpec | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_context: int
    grouped_routing: GroupedRouting | None = None  # of the router "grouped"
    output_bias: bool = True  # where attention has biases, its output projection has one too
    rotary_size: int | None = None  # components of a head that RoPE turns; None: all
    window: int | None = None  # tokens that one of a sliding layer sees, its own included
    sinks: bool = False  # each head of a layer has a score that takes weight and gives no value
    router_bias: bool = False
    expert_bias: bool = False  # all three projections of an expert have one
    expert_activation: ExpertActivation = "silu"
    latent: LatentSpec | None = None  # of latent layers; None: there are none
    num_vision_params: int = 0  # vision tower and projector of a multimodal checkpoint
    vision: VisionSpec | None = None

    @staticmethod
    def from_hf(config: dict) -> "ModelSpec":
        """The spec of a config.json, whichever library version wrote it.

        Raises MoecliError for a dense model, an unknown architecture, a missing or odd key.
        """
        from moecli.models.hf_config import read_spec

        return read_spec(config)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.moe)

    @property
    def expert_numel(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @cached_property
    def dense_tensors(self) -> tuple[DenseTensor, ...]:
        """Every tensor outside the routed experts, in the order in which a token meets them."""
        embed = DenseTensor("embed_tokens", (self.vocab_size, self.hidden_size))
        head = DenseTensor("lm_head", (self.vocab_size, self.hidden_size), linear=True)
        layers = [t for index in range(self.num_layers) for t in self._layer_tensors(index)]
        norm = DenseTensor("norm", (self.hidden_size,))
        return (embed, *layers, norm, *(() if self.tie_word_embeddings else (head,)))

    def _layer_tensors(self, index: int) -> list[DenseTensor]:
        layer, hidden = self.layers[index], self.hidden_size
        latent = layer.attention == "latent"
        found = [DenseTensor("input_norm", (hidden,))]
        found += self._latent_tensors() if latent else self._head_tensors()
        found.append(DenseTensor("post_norm", (hidden,)))
        if layer.moe:
            found.append(DenseTensor("router", (self.num_experts, hidden)))
            if self.router_bias:
                found.append(DenseTensor("router.bias", (self.num_experts,)))
            if self.expert_bias:
                inner = 2 * self.expert_intermediate_size
                for name, size in (("gate_up_bias", inner), ("down_bias", hidden)):
                    shape = (self.num_experts, size)
                    found.append(DenseTensor(f"experts.{name}", shape, expanded=True))
            if self.grouped_routing is not None:
                found.append(DenseTensor("router.correction", (self.num_experts,), exact=True))
            found += _mlp_tensors("shared", hidden, self.shared_intermediate_size)
        else:
            found += _mlp_tensors("mlp", hidden, self.dense_intermediate_size)
        return [replace(tensor, name=f"layers.{index}.{tensor.name}") for tensor in found]

    def _head_tensors(self) -> list[DenseTensor]:
        hidden = self.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"q_proj": (q_size, hidden), "k_proj": (kv_size, hidden)}
        shapes |= {"v_proj": (kv_size, hidden), "o_proj": (hidden, q_size)}
        found = [DenseTensor(name, shape, linear=True) for name, shape in shapes.items()]
        if self.attention_bias:
            found += [
                DenseTensor(f"{name}.bias", shape[:1])
                for name, shape in shapes.items()
                if name != "o_proj" or self.output_bias
            ]
        if self.qk_norm == "weighted_before_rope":
            found += [DenseTensor(name, (self.head_dim,)) for name in ("q_norm", "k_norm")]
        if self.sinks:
            found.append(DenseTensor("sinks", (self.num_heads,)))
        return found

    def _latent_tensors(self) -> list[DenseTensor]:
        latent, hidden, heads = self.latent, self.hidden_size, self.num_heads
        assert latent is not None, "a latent layer of a model without latents"
        q_size = heads * latent.head_size
        shapes = {"kv_a_proj": (latent.kept_size, hidden)}
        shapes |= {"o_proj": (hidden, heads * latent.value_size)}
        norms = {"kv_a_norm": latent.rank}
        if latent.query_rank:
            shapes |= {"q_a_proj": (latent.query_rank, hidden)}
            norms |= {"q_a_norm": latent.query_rank}
        found = [DenseTensor(f"{name}.bias", shape[:1]) for name, shape in shapes.items()]
        found = found if self.attention_bias else []
        shapes |= {
            "q_b_proj" if latent.query_rank else "q_proj": (q_size, latent.query_rank or hidden)
        }
        found += [DenseTensor(name, shape, linear=True) for name, shape in shapes.items()]
        kv_b = (heads * (latent.nope_size + latent.value_size), latent.rank)
        found.append(DenseTensor("kv_b_proj", kv_b, linear=True, expanded=True))
        return found + [DenseTensor(name, (size,)) for name, size in norms.items()]

    @property
    def num_text_params(self) -> int:
        """Weights of the text decoder; a tied embedding counts once."""
        experts = len(self.moe_layers) * self.num_experts * self.expert_numel
        return sum(tensor.numel for tensor in self.dense_tensors) + experts

    @property
    def num_params(self) -> int:
        """All weights of the checkpoint, a vision tower included: the number that is published."""
        return self.num_text_params + self.num_vision_params

    @property
    def num_active_params(self) -> int:
        """Text weights less the experts that one token does not choose; embeddings count."""
        idle = self.num_experts - self.experts_per_token
        biases = 2 * self.expert_intermediate_size + self.hidden_size if self.expert_bias else 0
        return self.num_text_params - len(self.moe_layers) * idle * (self.expert_numel + biases)

    def kv_capacity(self, layer: int, ctx: int) -> int:
        """Tokens that `layer` holds at a context of `ctx`: one chunk, or one window, at most."""
        kind = self.layers[layer].attention
        if kind == "chunked":
            assert self.chunk_size is not None, "a chunked layer without a chunk size"
            return min(ctx, self.chunk_size)
        if kind == "sliding":
            assert self.window is not None, "a sliding layer without a window"
            return min(ctx, self.window)
        return ctx

    def kv_copies(self, layer: int, ctx: int) -> int:
        """How often `layer` is kept: a window that moves on also as it was after the prompt."""
        return 2 if self.layers[layer].attention == "sliding" and ctx > (self.window or 0) else 1

    def kv_shape(self, layer: int) -> tuple[int, int, int]:
        """What `layer` keeps of a token: how many kinds of vectors, heads of each, their size."""
        if self.layers[layer].attention == "latent":
            assert self.latent is not None, "a latent layer of a model without latents"
            return 1, 1, self.latent.kept_size
        return 2, self.num_kv_heads, self.head_dim  # keys and values

    def kv_nbytes(self, ctx: int, itemsize: int, scale_itemsize: int = 0) -> int:
        """Bytes of the KV cache of one sequence of `ctx` tokens, `itemsize` bytes a number.

        `scale_itemsize`: bytes that each vector takes besides.
        """
        total = 0
        for layer in range(self.num_layers):
            kinds, heads, size = self.kv_shape(layer)
            vectors = kinds * heads * self.kv_capacity(layer, ctx) * self.kv_copies(layer, ctx)
            total += vectors * (size * itemsize + scale_itemsize)
        return total


def _mlp_tensors(prefix: str, hidden: int, intermediate: int) -> list[DenseTensor]:
    if not intermediate:
        return []
    return [
        DenseTensor(f"{prefix}.gate_proj", (intermediate, hidden), linear=True),
        DenseTensor(f"{prefix}.up_proj", (intermediate, hidden), linear=True),
        DenseTensor(f"{prefix}.down_proj", (hidden, intermediate), linear=True),
    ]
