"""Knows attention over the KV caches of a ragged batch, with RoPE and q/k norms; no experts.

Legend of the shapes: T new tokens, L tokens looked at, N query heads, K key heads, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import ModelSpec, RopeKind, RopeSpec
from quant.ops import linear
from quant.tensor import QuantizedWeight

Weight = QuantizedWeight | Tensor
Weights = Callable[[str], Weight]  # by the names of ModelSpec.dense_tensors


def dense(weights: Weights, name: str) -> Tensor:
    """A weight that must be a plain tensor."""
    weight = weights(name)
    assert isinstance(weight, Tensor), f"{name} is quantized"
    return weight


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalised in fp32 over the last dimension, cast back, then multiplied by the weight."""
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    return normed if weight is None else normed * weight


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position turns each pair of components, [D / 2] fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)  # in the original context
    slow = frequencies / scaling.factor
    if scaling.high == scaling.low:  # the blend in between is 0/0, and empty
        return torch.where(turns < scaling.low, slow, frequencies)
    blend = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return slow + blend * (frequencies - slow)


def rotate(x: Tensor, turns: Tensor, kind: RopeKind) -> Tensor:
    """x [T, heads, D] turned by unit complex numbers [T, D / 2], computed in fp32."""
    y = x.float()
    if kind == "interleaved":
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)
    cos = torch.cat((turns.real, turns.real), dim=-1)[:, None]
    sin = torch.cat((-turns.imag, turns.imag), dim=-1)[:, None]
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


@dataclass(frozen=True)
class StepContext:
    """What all layers of one forward pass share."""

    slices: tuple[SequenceSlice, ...]
    turns: Tensor  # [T, D / 2] complex64: RoPE of each token
    temperature: Tensor | None  # [T, 1, 1] fp32 factor of queries without RoPE; None: all ones


class StepMaker:
    """Makes the StepContext of a batch.

    RoPE is computed for the positions at hand: four small operations a pass, against a table that
    at a million positions would take half a GiB.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.temperature = spec.temperature
        self.inverse_frequencies = inverse_frequencies(spec.rope, spec.head_dim)

    def __call__(self, batch: Batch) -> StepContext:
        positions = batch.positions()
        angles = positions.float()[:, None] * self.inverse_frequencies
        turns = torch.polar(torch.ones_like(angles), angles)
        factor, tuning = None, self.temperature
        if tuning is not None and batch.end >= tuning.floor:
            octaves = torch.floor((positions.float() + 1) / tuning.floor)
            factor = (1 + tuning.scale * torch.log1p(octaves))[:, None, None]
        return StepContext(batch.slices, turns, factor)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last T of L tokens, scaled by D^-0.5.

    Shapes: queries [T, N, D], keys and values [K, L, D], returns [T, N * D]. Heads of a group share
    their keys by a zero stride, so nothing is copied.
    """
    count, heads, size = queries.shape
    kv_heads, length, _ = keys.shape
    grouped = queries.view(count, kv_heads, heads // kv_heads, size)
    if count == 1:  # the group stands where tokens would: its keys are read once
        out = F.scaled_dot_product_attention(grouped, keys[None], values[None])
        return out.reshape(1, -1)
    shape = (kv_heads, heads // kv_heads, length, size)
    keys, values = keys[:, None].expand(shape), values[:, None].expand(shape)
    rows = grouped.permute(1, 2, 0, 3)  # [K, N / K, T, D]
    if count == length:
        out = F.scaled_dot_product_attention(rows, keys, values, is_causal=True)
    else:
        mask = _last_rows_first_mask(count, length, queries.dtype)
        out = F.scaled_dot_product_attention(rows.flip(2), keys, values, attn_mask=mask).flip(2)
    return out.permute(2, 0, 1, 3).reshape(count, -1)


def _last_rows_first_mask(count: int, length: int, dtype: torch.dtype) -> Tensor:
    """Causal mask [T, L] of the last T of L tokens, their rows reversed.

    So reversed, entry (i, j) depends on i + j alone: the matrix is a view of T + L - 1 numbers.
    """
    steps = torch.zeros(length + count - 1, dtype=dtype)
    steps[length:] = -torch.inf
    return steps.as_strided((count, length), (1, 1))


class Attention:
    """The attention of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Weights, dtype: torch.dtype) -> None:
        prefix = f"layers.{layer}."
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.layer = layer
        self.dtype = dtype
        self.heads = (spec.num_heads, spec.num_kv_heads)
        self.head_dim = spec.head_dim
        self.eps = spec.rms_norm_eps
        self.rope = spec.rope.kind if spec.layers[layer].rope else None
        self.projections = [weights(prefix + name) for name in names]
        self.biases: list[Tensor | None] = [None] * 4
        if spec.attention_bias:
            self.biases = [dense(weights, f"{prefix}{name}.bias").to(dtype) for name in names]
        self.norm_weight: Tensor | None = None  # [N + K, D]: before RoPE
        if spec.qk_norm == "weighted_before_rope":
            stacked = [
                dense(weights, prefix + name).to(dtype).expand(count, -1)
                for name, count in zip(("q_norm", "k_norm"), self.heads, strict=True)
            ]
            self.norm_weight = torch.cat(stacked)
        self.norm_after = spec.qk_norm == "weightless_after_rope" and self.rope is not None

    def __call__(self, hidden: Tensor, step: StepContext) -> Tensor:
        """hidden [T, H], already normalised -> [T, H]."""
        q, k, v = (self._project(hidden, i).unflatten(-1, (-1, self.head_dim)) for i in range(3))
        q, k = self._position(torch.cat((q, k), dim=1), step)  # [T, N, D], [T, K, D]
        pieces, row = [], 0
        for piece in step.slices:
            rows = slice(row, row + piece.length)
            pieces += self._sequence(piece, q[rows], k[rows], v[rows])
            row += piece.length
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # [T, N * D]
        return self._project(out, 3)

    def _project(self, x: Tensor, index: int) -> Tensor:
        out, bias = linear(x, self.projections[index]), self.biases[index]
        return out if bias is None else out + bias

    def _position(self, qk: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Norms and RoPE treat queries and keys alike, so they go through them as one."""
        if self.norm_weight is not None:
            qk = rms_norm(qk, self.norm_weight, self.eps)
        if self.rope is not None:
            qk = rotate(qk, step.turns, self.rope)
        if self.norm_after:
            qk = rms_norm(qk, None, self.eps)
        q, k = qk.split(self.heads, dim=1)
        if self.rope is None and step.temperature is not None:
            q = (q * step.temperature).to(self.dtype)
        return q, k

    def _sequence(self, piece: SequenceSlice, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """One sequence's tokens, chunk by chunk where the layer is chunked.

        Attention is computed as the cache stores keys and values: expanding a long context to fp32
        for each token would cost several times what attention itself does.
        """
        q = q.to(piece.cache.dtype)
        appended = piece.cache.append(self.layer, piece.start, k, v)
        return [
            attend(q[first:last], keys, values).to(self.dtype)
            for first, last, keys, values in appended
        ]
