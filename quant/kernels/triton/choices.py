"""Knows what the kernels of routed experts share, for few tokens and for many: an expert's bytes,
what stands between its projections, and how the contributions of a token's choices add up.

Legend: T tokens, k choices a token, N = T * k choices, E experts, H hidden, I intermediate.
"""

import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.experts import SWIGLU_ALPHA, SWIGLU_LIMIT, inner_of
from quant.kernels.triton.card import OPTIONS
from quant.layout import ExpertLayout

_ALPHA, _LIMIT = tl.constexpr(SWIGLU_ALPHA), tl.constexpr(SWIGLU_LIMIT)
_NUMBERS = 2048  # of a tile: as many as a warp keeps in its registers
_COLUMNS = 256  # of a tile, at most


def biased(biases: Tensor | None, hidden_size: int) -> int:
    """What kernels must know of biases [E, 2 I + H]: I; 0 where there are none."""
    return 0 if biases is None else inner_of(biases, hidden_size)


def bytes_of(layout: ExpertLayout) -> dict[str, int]:
    """What the kernels must know of an expert's bytes: its projections are of one size."""
    starts, nbytes = [part.offset for part in layout.parts[::2]], layout.nbytes // 3
    assert starts == [0, nbytes, 2 * nbytes], "gate, up and down must follow each other evenly"
    return {
        "BITS": layout.scheme.bits,
        "GROUP_SIZE": layout.scheme.group_size,
        "PACKED_NBYTES": layout.parts[0].nbytes,
        "PROJECTION_NBYTES": nbytes,
    }


def add_choices(
    out: Tensor,  # fp32 [T, H], contiguous
    contributions: Tensor,  # fp32 [N, H], undefined where the expert is not here
    topk_ids: Tensor,  # int64 [T, k], contiguous
    addresses: Tensor,  # int64 [E]; 0: not here
) -> None:
    """out += the contributions of each token's choices, in their order."""
    (num_tokens, top_k), hidden_size = topk_ids.shape, out.shape[1]
    choices = triton.next_power_of_2(top_k)
    columns = max(1, min(_COLUMNS, _NUMBERS // choices))
    _add_kernel[num_tokens, triton.cdiv(hidden_size, columns)](
        *(out, contributions, topk_ids, addresses),
        TOP_K=top_k,
        HIDDEN=hidden_size,
        CHOICES=choices,
        COLUMNS=columns,
        num_warps=1,
        **OPTIONS,
    )


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """What goes into down, of fp32 products with gate and with up; see quant.kernels.experts."""
    if ACTIVATION == "clamped_swiglu":
        # Comparisons let through what is no number, as torch's clamp does; minimum would hide it.
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, up)
        up = tl.where(up < -_LIMIT, -_LIMIT, up)
        value = (up + 1.0) * gate / (1.0 + tl.exp(gate * -_ALPHA))
    else:
        tl.static_assert(ACTIVATION == "silu", "an activation that kernels do not know")
        value = gate / (1.0 + tl.exp(-gate)) * up
    return value


@triton.jit
def bias_at(
    biases,  # fp32 [E, 2 I + H]
    expert,
    row,
    inside,
    PART: tl.constexpr,  # 0: of gate; 1: of up; 2: of down
    HIDDEN: tl.constexpr,
    BIASED: tl.constexpr,  # I
):
    """What is added to these rows of a projection's product, whichever of them count."""
    start = expert.to(tl.int64) * (2 * BIASED + HIDDEN) + PART * BIASED
    return tl.load(biases + start + row, inside, other=0.0)


@triton.jit
def _add_kernel(
    out,
    contributions,
    ids,
    addresses,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHOICES: tl.constexpr,  # k, rounded up to a power of two
    COLUMNS: tl.constexpr,
):
    """Program (t, b): a block of out[t]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    k = tl.arange(0, CHOICES)
    # All choices at once: what waits for an id, and for an address, waits once and not k times.
    here = k < TOP_K
    expert = tl.load(ids + token * TOP_K + k, here, other=0)
    here &= tl.load(addresses + expert, here, other=0) != 0
    places = (token * TOP_K + k)[:, None] * HIDDEN + columns[None, :]
    found = tl.load(contributions + places, here[:, None] & inside[None, :], other=0.0)
    place = token * HIDDEN + columns
    before = tl.load(out + place, inside, other=0.0)
    tl.store(out + place, before + tl.sum(found, 0), inside)
