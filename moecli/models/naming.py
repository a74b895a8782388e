"""Knows what checkpoints call the tensors of each family; knows neither files nor numbers."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from moecli.errors import MoecliError
from moecli.models.config import DenseTensor, ModelSpec
from quant.items import PROJECTIONS, DenseItem, ExpertItem, TensorSlice
from quant.pack_quantized import EXPERT_TARGETS
from quant.scheme import QuantScheme

W = TypeVar("W")
Shapes = Mapping[str, tuple[int, ...]]
_PACKED_SUFFIX = ".weight_packed"
_BARE = (".bias", "_bias", ".sinks")  # endings of tensors that are no module's `.weight`
_EXPERT_BIASES = {"gate_up_bias": "gate_up_proj_bias", "down_bias": "down_proj_bias"}
_EMBEDDING = "embed_tokens.weight"
_REINDEX_HINT = "the checkpoint is incomplete, or its config.json belongs to another"


@dataclass(frozen=True)
class FamilyNames:
    """Modules of a decoder layer by the names of one family."""

    router: str
    shared: str | None
    mlp: str  # of a layer without experts
    experts: str
    fused_transposed: bool  # fused experts are stored [E, in, out] instead of [E, out, in]
    projections: tuple[str, str, str] = PROJECTIONS  # gate, up and down of an unfused expert
    fused_interleaved: bool = False  # rows of gate and up are neighbours when fused, else halves


_MIXTRAL_PROJECTIONS = ("w1", "w3", "w2")
FAMILIES = {
    "llama4": FamilyNames(
        router="feed_forward.router",
        shared="feed_forward.shared_expert",
        mlp="feed_forward",
        experts="feed_forward.experts",
        fused_transposed=True,
    ),
    "qwen3_moe": FamilyNames(
        router="mlp.gate", shared=None, mlp="mlp", experts="mlp.experts", fused_transposed=False
    ),
    "mixtral": FamilyNames(
        router="block_sparse_moe.gate",
        shared=None,
        mlp="mlp",
        experts="block_sparse_moe.experts",
        fused_transposed=False,
        projections=_MIXTRAL_PROJECTIONS,
    ),
}
_WITH_SHARED = replace(FAMILIES["qwen3_moe"], shared="mlp.shared_experts")
FAMILIES |= dict.fromkeys(("glm4_moe", "deepseek_v2", "deepseek_v3"), _WITH_SHARED)
FAMILIES["gpt_oss"] = FamilyNames(
    router="mlp.router",
    shared=None,
    mlp="mlp",
    experts="mlp.experts",
    fused_transposed=True,
    fused_interleaved=True,
)
# What a family's models call their modules in memory, where their checkpoints call them otherwise.
_IN_MEMORY = {
    "mixtral": FamilyNames(
        router="mlp.gate",
        shared=None,
        mlp="mlp",
        experts="mlp.experts",
        fused_transposed=False,
        projections=_MIXTRAL_PROJECTIONS,
    ),
}
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q_a_norm": "self_attn.q_a_layernorm",
    "kv_a_norm": "self_attn.kv_a_layernorm",
}
_LATENT_PROJECTIONS = {"kv_a_proj": "kv_a_proj_with_mqa"}


@dataclass(frozen=True)
class Conversion:
    """What a source checkpoint becomes."""

    experts: tuple[ExpertItem, ...]  # by layer, then expert
    dense: tuple[DenseItem, ...]
    ignore: tuple[str, ...]  # linears kept in 16 bits, as quantization_config names them
    expert_targets: tuple[str, ...] = EXPERT_TARGETS  # linears of experts, likewise
    left_out: tuple[str, ...] = ()  # tensors of layers after the last that computes the next token


class CheckpointNames:
    """The names of one checkpoint: a family's, under the prefix that this checkpoint uses."""

    def __init__(self, spec: ModelSpec, names: Collection[str]) -> None:
        """`names`: all tensors of the checkpoint; raises MoecliError if no embedding is there."""
        self.spec = spec
        self.body = _prefix_of(_EMBEDDING, names)
        self.family = FAMILIES[spec.family]
        other = _IN_MEMORY.get(spec.family)
        if other is not None:
            router = f"{self.body}layers.{spec.moe_layers[0]}.{other.router}.weight"
            self.family = other if router in names else self.family
        heads = [name for name in names if name.rpartition(".")[0].endswith("lm_head")]
        self.head = min(heads, key=len).rpartition(".")[0] if heads else "lm_head"

    def module(self, tensor: str) -> str:
        """The module of one of `spec.dense_tensors`, less `.weight`, or the name of a bias."""
        if tensor == "lm_head":
            return self.head
        if not tensor.startswith("layers."):
            return self.body + tensor
        _, index, local = tensor.split(".", 2)
        return f"{self.body}layers.{index}.{self._local(local)}"

    def tensor(self, tensor: str) -> str:
        """The full name of one of `spec.dense_tensors` as it is when not quantized."""
        module = self.module(tensor)
        return module if module.endswith(_BARE) else module + ".weight"

    def expert(self, layer: int, expert: int) -> str:
        """The module of an unfused expert, which is how experts are written."""
        return f"{self.experts(layer)}.{expert}"

    def experts(self, layer: int) -> str:
        """The module that holds the experts of a layer."""
        return f"{self.body}layers.{layer}.{self.family.experts}"

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor is of a layer with a higher number than the model's layers have."""
        layers = self.body + "layers."
        index = name.removeprefix(layers).partition(".")[0]
        return name.startswith(layers) and index.isdigit() and int(index) >= self.spec.num_layers

    def _local(self, local: str) -> str:
        block, _, rest = local.partition(".")
        if local in _NORMS:
            return _NORMS[local]
        if local == "router":
            return self.family.router
        if local == "router.correction":
            return f"{self.family.router}.e_score_correction_bias"
        if block == "router":
            return f"{self.family.router}.{rest}"
        if block == "experts":
            return f"{self.family.experts}.{_EXPERT_BIASES[rest]}"
        if block == "shared":
            return f"{self.family.shared}.{rest}"
        if block == "mlp":
            return f"{self.family.mlp}.{rest}"
        return ".".join(filter(None, ("self_attn", _LATENT_PROJECTIONS.get(block, block), rest)))


def _prefix_of(suffix: str, names: Collection[str]) -> str:
    """What stands before `suffix`; the shortest, where several tensors end so."""
    found = [name for name in names if name == suffix or name.endswith("." + suffix)]
    if not found:
        raise MoecliError(f"no tensor `{suffix}` in the checkpoint", _REINDEX_HINT)
    return min(found, key=len).removesuffix(suffix)


def dense_loader(
    spec: ModelSpec, names: Collection[str], read: Callable[[str], W]
) -> Callable[[str], W]:
    """A Decoder's `weights` over a checkpoint, quantized or not.

    `read` takes a module's name where the checkpoint holds packed integers for it, else the
    tensor's full name. Raises MoecliError for a tensor that is not there.
    """
    known = CheckpointNames(spec, names)

    def weights(tensor: str) -> W:
        module, full = known.module(tensor), known.tensor(tensor)
        if module + _PACKED_SUFFIX in names:
            return read(module)
        if full not in names:
            raise MoecliError(f"tensor `{full}` is missing from the checkpoint", _REINDEX_HINT)
        return read(full)

    return weights


def plan_conversion(
    spec: ModelSpec, shapes: Shapes, dense_scheme: QuantScheme | None = None
) -> Conversion:
    """What to write for a source checkpoint with tensors of these shapes.

    Attention, dense MLPs, the shared expert and an untied head take `dense_scheme`; routers,
    norms, embeddings and everything that is no part of the text decoder keep their 16 bits and
    their names. Layers that predict later tokens than the next (MTP) are left out. Raises
    MoecliError for a missing tensor or a wrong shape.
    """
    names = CheckpointNames(spec, shapes)
    used: set[str] = set()

    def take(name: str, *expected: int) -> str:
        _require(shapes, name, expected)
        used.add(name)
        return name

    experts = tuple(
        item for layer in spec.moe_layers for item in _expert_items(names, shapes, layer, take)
    )
    dense = [_dense_item(names, tensor, dense_scheme, take) for tensor in spec.dense_tensors]
    if spec.tie_word_embeddings:
        used.add(names.head + ".weight")  # a stored copy of the embedding
    left_out = tuple(name for name in shapes if names.is_beyond(name))
    rest = [name for name in shapes if name not in used and not names.is_beyond(name)]
    dense += [DenseItem(name, TensorSlice(name, None, False, None), None) for name in rest]
    ignored = _ignored(names, rest, dense_scheme)
    return Conversion(experts, tuple(dense), ignored, _expert_targets(names), left_out)


def _require(shapes: Shapes, name: str, expected: tuple[int, ...]) -> None:
    found = shapes.get(name)
    if found is None:
        raise MoecliError(f"tensor `{name}` is missing from the checkpoint", _REINDEX_HINT)
    if tuple(found) != expected:
        raise MoecliError(
            f"tensor `{name}` has shape {list(found)}; config.json makes it {list(expected)}",
            _REINDEX_HINT,
        )


def _dense_item(
    names: CheckpointNames,
    tensor: DenseTensor,
    scheme: QuantScheme | None,
    take: Callable[..., str],
) -> DenseItem:
    source = TensorSlice(take(names.tensor(tensor.name), *tensor.shape), None, False, None)
    if tensor.linear and scheme is not None:
        return DenseItem(names.module(tensor.name), source, scheme)
    return DenseItem(source.name, source, None, tensor.exact)


def _expert_items(
    names: CheckpointNames, shapes: Shapes, layer: int, take: Callable[..., str]
) -> list[ExpertItem]:
    """The experts of one layer, fused into two tensors or three linears each."""
    spec, module = names.spec, names.experts(layer)
    count, hidden, inner = spec.num_experts, spec.hidden_size, spec.expert_intermediate_size
    written = names.family.projections
    if f"{module}.gate_up_proj" not in shapes:

        def part(expert: int, place: int, *shape: int) -> TensorSlice:
            return TensorSlice(take(f"{module}.{expert}.{written[place]}.weight", *shape))

        return [
            ExpertItem(
                layer,
                expert,
                names.expert(layer, expert),
                part(expert, 0, inner, hidden),
                part(expert, 1, inner, hidden),
                part(expert, 2, hidden, inner),
                written,
            )
            for expert in range(count)
        ]
    flip = names.family.fused_transposed
    gate_up_shape, down_shape = (2 * inner, hidden), (hidden, inner)
    if flip:
        gate_up_shape, down_shape = gate_up_shape[::-1], down_shape[::-1]
    gate_rows, up_rows = ((0, inner), 1), ((inner, 2 * inner), 1)
    if names.family.fused_interleaved:
        gate_rows, up_rows = ((0, 2 * inner), 2), ((1, 2 * inner), 2)
    gate_up = take(f"{module}.gate_up_proj", count, *gate_up_shape)
    down = take(f"{module}.down_proj", count, *down_shape)
    return [
        ExpertItem(
            layer,
            expert,
            names.expert(layer, expert),
            TensorSlice(gate_up, expert, flip, *gate_rows),
            TensorSlice(gate_up, expert, flip, *up_rows),
            TensorSlice(down, expert, flip, None),
            written,
        )
        for expert in range(count)
    ]


def _expert_targets(names: CheckpointNames) -> tuple[str, ...]:
    """A pattern of the linears of unfused experts."""
    if names.family.projections == PROJECTIONS:
        return EXPERT_TARGETS
    endings = "|".join(names.family.projections)
    return (rf"re:.*\.experts\..*\.({endings})$",)


def _ignored(
    names: CheckpointNames, rest: list[str], dense_scheme: QuantScheme | None
) -> tuple[str, ...]:
    """Patterns of the linears that stay in 16 bits."""
    ignore = [f"re:.*{names.family.router.replace('.', '[.]')}$"]
    if names.spec.tie_word_embeddings or dense_scheme is None:
        ignore.append("re:.*lm_head$")
    if dense_scheme is None:
        ignore.append("re:.*self_attn[.].*_proj(_with_mqa)?$")
        if names.family.shared and names.spec.shared_intermediate_size:
            ignore.append(f"re:.*{names.family.shared.replace('.', '[.]')}[.].*_proj$")
        if names.spec.dense_intermediate_size:
            ignore.append(f"re:.*{names.family.mlp}[.](gate|up|down)_proj$")
    ignore += sorted({f"re:.*{name.split('.')[0]}[.].*" for name in rest if "." in name})
    return tuple(ignore)
