"""Knows how layers, experts and caches become what the compiled calls for few tokens take.

Each function gives None where there is something that those calls do not know, or cannot read.
What an argument points to must outlive it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moecli.kv_cache import KvCache
from moecli.models.attention import Attention, Weight
from moecli.models.moe import MoeBlock, Router
from moecli.models.provider import Resident
from quant.kernels.cpu import few

if TYPE_CHECKING:
    from moecli.models.decoder import DecoderLayer


def layer_argument(index: int, layer: "DecoderLayer") -> few.LayerArgument | None:
    """Attention and the choice of experts."""
    attention = layer.attention
    if not isinstance(attention, Attention):  # over latents: there is no such call
        return None
    heads = attention.heads
    pairs = zip(attention.projections, attention.biases, strict=True)
    weights = [few.weight_argument(weight, bias) for weight, bias in pairs]
    q, k, v, o = weights
    router, guess = few.RouterArgument(), few.RouterArgument()
    found = [_fill_router(router, layer.mlp.router)] if isinstance(layer.mlp, MoeBlock) else []
    if layer.lookahead is not None:
        found.append(_fill_router(guess, layer.lookahead.block.router))
        guess.top_k = layer.lookahead.guesses
    if q is None or k is None or v is None or o is None or not all(found):
        return None
    if not few.share_input((q, k, v)):
        return None
    norm = heads.norm_weight
    guess_norm = None if layer.lookahead is None else layer.lookahead.norm
    size = attention.head_dim
    return few.LayerArgument(
        *(index, q.matrix.in_features, q.rows // size, k.rows // size, size, heads.turned),
        *(few.ROPES[heads.rope], few.NORMS[heads.norm], heads.tempered, layer.eps),
        layer.input_norm.data_ptr(),
        None if norm is None else norm.data_ptr(),
        None if heads.sinks is None else heads.sinks.data_ptr(),
        *(layer.post_norm.data_ptr(), q, k, v, o, router, guess),
        None if guess_norm is None else guess_norm.data_ptr(),
    )


def _fill_router(argument: few.RouterArgument, router: object) -> bool:
    """False where it is a stand-in for one, or its weight is of a kind that cannot be read."""
    if not isinstance(router, Router):
        return False
    weight = few.weight_argument(router.weight, router.bias)
    if weight is None:
        return False
    argument.weight, argument.top_k = weight, router.top_k
    argument.kind, argument.normalize = few.ROUTERS[router.kind], router.normalize
    if router.grouped is not None:
        assert router.correction is not None, "a grouped router without its correction"
        argument.correction, argument.scale = router.correction.data_ptr(), router.grouped.scale
        argument.groups = router.grouped.num_groups
        argument.best_groups = router.grouped.groups_per_token
    return True


def mlp_argument(weights: Sequence[Weight]) -> few.MlpArgument | None:
    """Gate, up and down of a gated MLP."""
    found = [few.weight_argument(weight) for weight in weights]
    readable = [argument for argument in found if argument is not None]
    if len(readable) < len(found) or not few.share_input(readable[:2]):
        return None
    return few.MlpArgument(*readable, few.ACTIVATIONS["silu"])


def residents_argument(resident: Resident | None) -> few.ResidentsArgument:
    """Of None: experts that are nobody's to use."""
    if resident is None:
        return few.ResidentsArgument()
    layout, biases = resident.layout, resident.biases
    arrays = (resident.addresses, resident.asked, resident.hits)
    return few.ResidentsArgument(
        *(numbers.buffer_info()[0] for numbers in arrays),
        *(len(resident.addresses), layout.intermediate_size),
        *(layout.scheme.bits, layout.scheme.group_size),
        *(few.ACTIVATIONS[resident.activation], resident.weight_on_input),
        None if biases is None else biases.data_ptr(),
    )


def place_argument(cache: KvCache, layer: int) -> few.PlaceArgument:
    """Where a cache keeps the keys and values of a layer."""
    storage, scales = cache.kept(layer)  # [2, K, slots, D]; [2, K, slots]
    assert storage.is_contiguous(), "a cache with gaps"
    kind = cache.kind(layer)
    ring = {"chunked": cache.chunk_size, "sliding": cache.window}.get(kind)
    at_scales = (None, None) if scales is None else (scales[0].data_ptr(), scales[1].data_ptr())
    return few.PlaceArgument(
        *(storage[0].data_ptr(), storage[1].data_ptr(), *at_scales),
        storage.stride(1) * storage.itemsize,
        0 if scales is None else scales.stride(1) * scales.itemsize,
        *(ring or 0, few.KEPT[storage.dtype], kind == "sliding"),
    )
