"""Knows how many graphics cards would hold all of a model, and how vLLM is started on them.

Arithmetic only: nothing here has been tried on such cards. Experts are in the scheme that is asked
for, everything else in 16 bits: so vLLM can divide each family's tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moecli.footprint import STORED_ITEMSIZE, expert_nbytes, stored_tensor_nbytes
from moecli.models.config import DenseTensor
from moecli.models.outline import Own
from moecli.units import GIB
from quant.scheme import QuantScheme

CARD_GIB = (24, 48, 80)  # cards are sold by them, and have about so much
UTILIZATION = 0.9  # of a card, what vLLM is told to use
RESERVE_NBYTES = 2 * GIB  # of that, for CUDA, captured graphs and activations: assumed
NODE_CARDS = 8
_MOST_NODES = 64
_KV_ITEMSIZE = 2


@dataclass(frozen=True)
class Cluster:
    """The fewest cards of one size that hold a model."""

    scheme: str  # of the experts; "bf16": nothing is quantized
    card_gib: int
    tensor_parallel: int  # cards that divide each layer
    pipeline_parallel: int  # stages that divide the layers
    expert_parallel: bool  # a stage's experts lie whole on its cards, not sliced
    card_nbytes: int  # what the fullest card holds: weights and KV cache

    @property
    def num_cards(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def num_nodes(self) -> int:
        return -(-self.num_cards // NODE_CARDS)


def smallest(spec: Own, scheme: QuantScheme | None, ctx: int, card_gib: int) -> Cluster | None:
    """The fewest cards for one sequence of `ctx` tokens; None where 64 nodes do not hold it."""
    usable = int(card_gib * GIB * UTILIZATION) - RESERVE_NBYTES
    for cards, stages in _layouts():
        whole = _whole_experts(spec, scheme, cards)
        if whole is None or stages > spec.num_layers:
            continue
        held = _fullest_nbytes(spec, scheme, ctx, cards, stages)
        if held <= usable:
            name = "bf16" if scheme is None else scheme.name
            return Cluster(name, card_gib, cards, stages, whole, held)
    return None


def assumed(ctx: int) -> str:
    """What `smallest` counts with, for people."""
    reserve = RESERVE_NBYTES // GIB
    return (
        f"one sequence of {ctx} tokens; {UTILIZATION:.0%} of each card less {reserve} GiB; all but "
        "experts in 16 bits"
    )


def _layouts() -> Iterator[tuple[int, int]]:
    """(cards a stage, stages): the fewest cards first, then the fewest stages.

    Beyond one node all of each node's cards are one stage.
    """
    for total in range(1, NODE_CARDS + 1):
        yield from ((cards, total // cards) for cards in (8, 4, 2, 1) if total % cards == 0)
    yield from ((NODE_CARDS, nodes) for nodes in range(2, _MOST_NODES + 1))


def _whole_experts(spec: Own, scheme: QuantScheme | None, cards: int) -> bool | None:
    """Whether experts lie whole on `cards` cards; None where the model cannot be divided so."""
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads % cards or (kv_heads % cards and cards % kv_heads):
        return None
    if cards > 1 and spec.num_experts > 1 and spec.num_experts % cards == 0:
        return True
    group = 1 if scheme is None else scheme.group_size
    return None if spec.expert_intermediate_size % (cards * group) else False


def _fullest_nbytes(
    spec: Own, scheme: QuantScheme | None, ctx: int, cards: int, stages: int
) -> int:
    """Bytes of the card that holds most: of weights, and of the keys and values of its layers."""
    layers = [0] * spec.num_layers
    before, after = STORED_ITEMSIZE * spec.num_vision_params, 0  # the layers
    for tensor in spec.dense_tensors:
        nbytes = _share(tensor, cards)
        first, _, rest = tensor.name.partition(".")
        if first == "layers":
            layers[int(rest.partition(".")[0])] += nbytes
        elif first == "embed_tokens":
            before += nbytes
        else:
            after += nbytes
    for index in spec.moe_layers:
        layers[index] += -(-spec.num_experts * expert_nbytes(spec, scheme) // cards)
    a_layer = -(-spec.kv_nbytes(ctx, _KV_ITEMSIZE) // (spec.num_layers * _kv_parts(spec, cards)))
    held = -(-spec.num_layers // stages)  # whichever these are
    stage = [sum(layers[start : start + held]) for start in range(spec.num_layers - held + 1)]
    stage[0] += before
    stage[-1] += after
    return max(stage) + held * a_layer


def _share(tensor: DenseTensor, cards: int) -> int:
    """What one of `cards` cards holds; norms, routers and projections to latents lie on each."""
    divided = (tensor.linear and "_a_proj" not in tensor.name) or tensor.name == "embed_tokens"
    nbytes = stored_tensor_nbytes(tensor, None)
    return -(-nbytes // cards) if divided else nbytes


def _kv_parts(spec: Own, cards: int) -> int:
    """Among how many cards a cache is divided: by heads, and latents not at all."""
    latent = any("kv_a_proj" in tensor.name for tensor in spec.dense_tensors)
    return 1 if latent else min(cards, spec.num_kv_heads)


def commands(cluster: Cluster, model: str, ctx: int) -> list[str]:
    """What starts vLLM there; several nodes are joined by Ray first. As vLLM documents it."""
    serve = [f"vllm serve {model}", f"--tensor-parallel-size {cluster.tensor_parallel}"]
    if cluster.expert_parallel:
        serve.append("--enable-expert-parallel")
    if cluster.pipeline_parallel > 1:
        serve.append(f"--pipeline-parallel-size {cluster.pipeline_parallel}")
    if cluster.num_nodes > 1:
        serve.append("--distributed-executor-backend ray")
    serve += [f"--max-model-len {ctx}", f"--gpu-memory-utilization {UTILIZATION}"]
    joined = ["ray start --head --port=6379", "ray start --address=FIRST_NODE:6379"]
    return [*(joined if cluster.num_nodes > 1 else []), " ".join(serve)]
