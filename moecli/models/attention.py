"""Knows attention over the KV caches of a ragged batch, with RoPE and q/k norms; no experts.

Legend of the shapes: T new tokens, L tokens looked at, N query heads, K key heads, D head size,
R of it turned by RoPE: all, unless the family turns a part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.kv_cache import KeptHeads
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import ModelSpec
from moecli.models.fused import position_heads, takes_kernels, windowed_attention
from moecli.models.int8_heads import attend_one
from moecli.models.rope import inverse_frequencies, magnitude
from quant.bnb import BnbWeight
from quant.ops import linear
from quant.tensor import QuantizedWeight

if TYPE_CHECKING:
    from moecli.models.latent import LatentHeads

Weight = QuantizedWeight | BnbWeight | Tensor
Weights = Callable[[str], Weight]  # by the names of ModelSpec.dense_tensors


def dense(weights: Weights, name: str) -> Tensor:
    """A weight that must be a plain tensor."""
    weight = weights(name)
    assert isinstance(weight, Tensor), f"{name} is quantized"
    return weight


@dataclass(frozen=True)
class Heads:
    """What becomes of a layer's queries and keys between projection and attention."""

    layer: int
    rope: str  # a RopeKind, or "none"
    norm: str  # "before" RoPE, "after" it, or "none"
    norm_weight: Tensor | None  # [N + K, D]
    tempered: bool  # queries are scaled by the temperature of their position
    eps: float
    turned: int  # how many components of a head RoPE turns, its first ones
    window: int | None = None  # tokens that one sees, its own included; None: all in the cache
    sinks: Tensor | None = None  # [N]: scores that take weight and give no value

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        layer: int,
        norm_weight: Tensor | None,
        sinks: Tensor | None = None,
    ) -> "Heads":
        rope = spec.layers[layer].rope
        norm = "none"
        if spec.qk_norm == "weighted_before_rope":
            norm = "before"
        elif spec.qk_norm == "weightless_after_rope" and rope:
            norm = "after"
        tempered = spec.temperature is not None and not rope
        kind = spec.rope.kind if rope else "none"
        turned = spec.rotary_size or spec.head_dim
        window = spec.window if spec.layers[layer].attention == "sliding" else None
        common = (layer, kind, norm, norm_weight, tempered, spec.rms_norm_eps)
        return cls(*common, turned, window, sinks)


class Step(Protocol):
    """What all layers of one forward pass share: positions, and where keys and values are kept."""

    @property
    def looks_ahead(self) -> bool:
        """Whether the host may look at the values of this pass, to guess the next layer's."""
        ...

    @property
    def rows(self) -> list[int] | None:
        """Which tokens' logits are wanted; None: all."""
        ...

    def attend(self, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Position queries and keys, keep keys and values, attend.

        Shapes: q [T, N, D], k and v [T, K, D] in the compute dtype; returns [T, N * D] in it.
        """
        ...

    def attend_latents(self, heads: "LatentHeads", queries: Tensor, latents: Tensor) -> Tensor:
        """The same where all heads share latents; shapes are those of LatentHeads."""
        ...


class Positions:
    """RoPE and temperature, computed for the positions at hand.

    That is a few small operations a pass, against a table that at a million positions would take
    half a GiB.
    """

    def __init__(self, spec: ModelSpec, device: torch.device | str = "cpu") -> None:
        self.temperature = spec.temperature
        turning = spec.rotary_size or spec.head_dim
        self.inverse_frequencies = inverse_frequencies(spec.rope, turning).to(device)
        self.magnitude = magnitude(spec.rope)

    def turns(self, positions: Tensor) -> Tensor:
        """positions [T] -> complex64 [T, R / 2], of magnitude one unless RoPE scales it."""
        angles = positions.float()[:, None] * self.inverse_frequencies
        return torch.polar(torch.full_like(angles, self.magnitude), angles)

    def temperatures(self, positions: Tensor) -> Tensor | None:
        """positions [T] -> fp32 factors [T, 1, 1] of queries without RoPE; None: always one."""
        if self.temperature is None:
            return None
        octaves = torch.floor((positions.float() + 1) / self.temperature.floor)
        return (1 + self.temperature.scale * torch.log1p(octaves))[:, None, None]


@dataclass(frozen=True)
class BatchStep:
    """The Step of a ragged batch."""

    slices: tuple[SequenceSlice, ...]
    rows: list[int] | None
    turns: Tensor  # [T, R / 2] complex64: RoPE of each token
    temperature: Tensor | None  # [T, 1, 1] fp32 factor of queries without RoPE; None: all ones
    looks_ahead: bool = True

    def attend(self, heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequence by sequence; see Step."""
        temperature = self.temperature if heads.tempered else None
        rules = (heads.norm_weight, heads.rope, heads.norm, heads.eps)
        q, k = position_heads(q, k, self.turns, temperature, *rules)
        pieces, row = [], 0
        for piece in self.slices:
            rows = slice(row, row + piece.length)
            pieces += self._sequence(heads, piece, q[rows], k[rows], v[rows])
            row += piece.length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def attend_latents(self, heads: "LatentHeads", queries: Tensor, latents: Tensor) -> Tensor:
        """Sequence by sequence; see Step."""
        queries, latents = heads.position(queries, latents, self.turns)
        pieces, row = [], 0
        for piece in self.slices:
            rows = slice(row, row + piece.length)
            kept = piece.cache.append_latents(heads.layer, piece.start, latents[rows])
            pieces.append(heads.attend(queries[rows], kept))
            row += piece.length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _sequence(
        self, heads: Heads, piece: SequenceSlice, q: Tensor, k: Tensor, v: Tensor
    ) -> list[Tensor]:
        """One sequence's tokens, chunk by chunk or window by window where the layer has them.

        Attention is computed as the cache stores keys and values: expanding a long context to fp32
        for each token would cost several times what attention itself does.
        """
        queries = q.to(piece.cache.attention_dtype)
        appended = piece.cache.append(heads.layer, piece.start, k, v)
        return [
            attend_kept(queries[first:last], keys, values, heads.window, heads.sinks).to(q.dtype)
            for first, last, keys, values in appended
        ]


class StepMaker:
    """Makes the Step of a batch."""

    def __init__(self, spec: ModelSpec, device: torch.device | str = "cpu") -> None:
        self.positions = Positions(spec, device)

    def __call__(self, batch: Batch) -> BatchStep:
        positions = batch.positions(self.positions.inverse_frequencies.device)
        tuning = self.positions.temperature
        factors = None
        if tuning is not None and batch.end >= tuning.floor:
            factors = self.positions.temperatures(positions)
        all_rows = batch.all_logits or len(batch.slices) == batch.token_ids.numel()
        rows = None if all_rows else batch.last_rows()
        return BatchStep(batch.slices, rows, self.positions.turns(positions), factors)


def attend_kept(
    queries: Tensor,
    keys: KeptHeads,
    values: KeptHeads,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend`, however keys and values are stored. Many tokens are worth expanding int8 once."""
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        assert isinstance(keys, Tensor), "keys in int8, values not"
        assert isinstance(values, Tensor), "values in int8, keys not"
        return attend(queries, keys, values, window, sinks)
    if queries.shape[0] == 1:
        return attend_one(queries, keys, values, sinks)
    expanded = keys.dequantize(queries.dtype), values.dequantize(queries.dtype)
    return attend(queries, *expanded, window, sinks)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of L tokens, scaled by D^-0.5.

    Shapes: queries [T, N, D], keys and values [K, L, D], sinks fp32 [N], returns [T, N * D]. With a
    window a token sees as many at most, its own included. A single token sees all keys. Heads of a
    group share their keys by a zero stride, so nothing is copied.
    """
    count, heads, size = queries.shape
    kv_heads, length, _ = keys.shape
    limit = None if count == 1 else window
    if (limit is not None or sinks is not None) and takes_kernels(queries):
        return windowed_attention(queries, keys, values, limit, sinks)
    grouped = queries.view(count, kv_heads, heads // kv_heads, size)
    if count == 1:  # the group stands where tokens would: its keys are read once
        rows = grouped
        of_rows = None if sinks is None else sinks.view(1, kv_heads, -1)
        return _product(rows, keys[None], values[None], None, of_rows).reshape(1, -1)
    shape = (kv_heads, heads // kv_heads, length, size)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    rows = grouped.permute(1, 2, 0, 3)  # [K, N / K, T, D]
    if window is not None or sinks is not None:
        mask = reversed_mask(count, length, rows.dtype, window)
        of_rows = None if sinks is None else sinks.view(kv_heads, -1, 1)
        out = _product(rows.flip(-2), keys, values, mask, of_rows).flip(-2)
    elif count == length:
        out = F.scaled_dot_product_attention(rows, keys, values, is_causal=True)
    else:
        masked = mask_by_view if queries.is_cpu else mask_by_name
        out = masked(rows, keys, values)
    return out.permute(2, 0, 1, 3).reshape(count, -1)


def _product(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Attention [..., T, D]; `sinks` [..., T] as it broadcasts are scores of their own.

    What a sink takes of the weight follows from the logarithm of the other scores' sum, so no key
    has to stand for it among those of the cache. On the processor alone: see takes_kernels.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, attn_mask=mask
    )
    left: Tensor = (log_sums - sinks).sigmoid()
    return (out * left[..., None]).to(rows.dtype)


def mask_by_view(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last T of L tokens, [..., T, D], with a mask that takes no memory."""
    mask = reversed_mask(rows.shape[-2], keys.shape[-2], rows.dtype)
    return F.scaled_dot_product_attention(rows.flip(-2), keys, values, attn_mask=mask).flip(-2)


def reversed_mask(count: int, length: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """[T, L] of the last T of L tokens, the last one first: 0 where it sees, else -inf.

    With rows so reversed, entry (i, j) depends on i + j alone: the matrix is a view of T + L - 1
    numbers.
    """
    steps = torch.zeros(length + count - 1, dtype=dtype)
    steps[length:] = -torch.inf
    if window is not None:
        steps[: max(0, length - window)] = -torch.inf
    return steps.as_strided((count, length), (1, 1))


def mask_by_name(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same for CUDA, whose kernels know this mask, and would copy one with odd strides."""
    from torch.nn.attention.bias import causal_lower_right  # a second or two, once: torch._dynamo

    mask = causal_lower_right(rows.shape[-2], keys.shape[-2])
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)


class Attention:
    """The attention of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Weights, dtype: torch.dtype) -> None:
        prefix = f"layers.{layer}."
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.head_dim = spec.head_dim
        self.projections = [weights(prefix + name) for name in names]
        self.biases: list[Tensor | None] = [None] * 4
        if spec.attention_bias:
            biased = names if spec.output_bias else names[:3]
            found = [dense(weights, f"{prefix}{name}.bias").to(dtype) for name in biased]
            self.biases[: len(found)] = found
        norm_weight: Tensor | None = None
        if spec.qk_norm == "weighted_before_rope":
            counts = (spec.num_heads, spec.num_kv_heads)
            stacked = [
                dense(weights, prefix + name).to(dtype).expand(count, -1)
                for name, count in zip(("q_norm", "k_norm"), counts, strict=True)
            ]
            norm_weight = torch.cat(stacked)
        sinks = dense(weights, prefix + "sinks").float() if spec.sinks else None
        self.heads = Heads.of(spec, layer, norm_weight, sinks)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """hidden [T, H], already normalised -> [T, H]."""
        q, k, v = (self._project(hidden, i).unflatten(-1, (-1, self.head_dim)) for i in range(3))
        return self._project(step.attend(self.heads, q, k, v), 3)

    def _project(self, x: Tensor, index: int) -> Tensor:
        out, bias = linear(x, self.projections[index]), self.biases[index]
        return out if bias is None else out + bias
