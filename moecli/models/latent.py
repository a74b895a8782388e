"""Knows attention whose keys and values all heads share as latents (MLA); not where those are kept.

A head's key is a matrix of its own times the latent, beside a part with RoPE that is the same for
all heads; its value is another matrix times the latent. Both are halves of one weight, `kv_b_proj`.
Few tokens are cheaper ABSORBED: queries go through the key half into the latents' space, where one
key serves all heads, and what they have seen comes back through the value half. Many are cheaper
EXPANDED: keys and values of every head are computed from the latents. The numbers are the same.

Legend of the shapes: T new tokens, L tokens looked at, H hidden, N heads, R rank of the latents,
P numbers with RoPE, K of a key without them, V of a value.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.models.attention import Step, Weight, Weights, attend, dense
from moecli.models.config import LatentSpec, ModelSpec
from moecli.models.fused import decode_latents, rms_norm, rotate
from moecli.models.latent_sizes import heads_at_once, most_absorbed
from quant.bnb import BnbWeight
from quant.ops import linear
from quant.quantize import dequantize
from quant.tensor import QuantizedWeight

_EPS = 1e-6  # of the norms in between, whatever config.json says of the others


@dataclass(frozen=True)
class LatentHeads:
    """What becomes of a layer's queries and latents between projection and result."""

    layer: int
    rope: str  # a RopeKind
    latent: LatentSpec
    kv_b: Tensor  # [N, K + V, R]

    @property
    def key_half(self) -> Tensor:
        return self.kv_b[:, : self.latent.nope_size]  # [N, K, R]

    @property
    def value_half(self) -> Tensor:
        return self.kv_b[:, self.latent.nope_size :]  # [N, V, R]

    def position(self, queries: Tensor, latents: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """queries [T, N, K + P] and latents [T, R + P] with RoPE in their last P numbers.

        turns: complex64 [T, P / 2].
        """
        plain, turned = queries.split((self.latent.nope_size, self.latent.rope_size), dim=-1)
        queries = torch.cat((plain, rotate(turned, turns, self.rope)), dim=-1)
        latent, key = latents.split((self.latent.rank, self.latent.rope_size), dim=-1)
        return queries, torch.cat((latent, rotate(key[:, None], turns, self.rope)[:, 0]), dim=-1)

    def attend(self, queries: Tensor, kept: Tensor) -> Tensor:
        """Causal attention of the last T of L tokens, in the cheaper form.

        Shapes: queries [T, N, K + P], kept [L, R + P] as the cache stores it; returns [T, N * V].
        On a device several tokens are always expanded: torch's kernels there want shorter vectors.
        """
        most = most_absorbed(self.latent, kept.shape[0])
        if queries.shape[0] <= (most if queries.is_cpu else 1):
            return self.absorbed(queries, kept)
        return self.expanded(queries, kept)

    def absorbed(self, queries: Tensor, kept: Tensor) -> Tensor:
        """`attend` in the latents' space, in the dtype of `kept`.

        What is kept is both key and value. Its last P numbers are no part of a value, but values
        without them would have to be copied.
        """
        scaled = self._absorb(queries) * self._unscaled(self.latent.kept_size)
        seen = attend(scaled.to(kept.dtype), kept[None], kept[None]).view_as(scaled)
        return self._values(seen[..., : self.latent.rank].to(queries.dtype))

    def decode(self, queries: Tensor, kept: Tensor, length: Tensor, splits: int) -> Tensor:
        """`absorbed` for one token that sees as many slots of `kept` [C, R + P] as `length` says.

        An operation of the device, in `splits` parts; length is int64 [1]. Returns [1, N * V].
        """
        absorbed = self._absorb(queries).to(kept.dtype)
        rules = (self.latent.rank, self.latent.scale, queries.dtype)
        return self._values(decode_latents(absorbed, kept, length, splits, *rules))

    def _absorb(self, queries: Tensor) -> Tensor:
        """queries [T, N, K + P] in the latents' space, [T, N, R + P]"""
        plain, turned = queries.split((self.latent.nope_size, self.latent.rope_size), dim=-1)
        plain = torch.bmm(plain.transpose(0, 1), self.key_half).transpose(0, 1)  # [T, N, R]
        return torch.cat((plain, turned), dim=-1)

    def _values(self, seen: Tensor) -> Tensor:
        """What the heads have seen of latents [T, N, R] -> [T, N * V]"""
        values = torch.bmm(seen.transpose(0, 1), self.value_half.mT)  # [N, T, V]
        return values.transpose(0, 1).flatten(1)

    def expanded(self, queries: Tensor, kept: Tensor) -> Tensor:
        """`attend` over keys and values of their own, some heads at once, in the queries' dtype."""
        num_heads = self.kv_b.shape[0]
        kept = kept.to(queries.dtype)
        heads = heads_at_once(self.latent, num_heads, kept.shape[0])
        queries = queries * self._unscaled(self.latent.padded_size)
        pieces = [
            self._expanded_heads(queries[:, first : first + heads], kept, first)
            for first in range(0, num_heads, heads)
        ]
        return torch.cat(pieces, dim=1).flatten(1)

    def _expanded_heads(self, queries: Tensor, kept: Tensor, first: int) -> Tensor:
        """The heads from `first` on, as many as there are queries of, [T, n, V]."""
        latent, (count, heads, size) = self.latent, queries.shape
        length, padded = kept.shape[0], latent.padded_size
        both = F.linear(kept[:, : latent.rank], self.kv_b[first : first + heads].flatten(0, 1))
        both = both.view(length, heads, -1).transpose(0, 1)  # [n, L, K + V]
        keys = kept.new_zeros(heads, length, padded)
        keys[..., : latent.nope_size] = both[..., : latent.nope_size]
        keys[..., latent.nope_size : size] = kept[:, latent.rank :]
        values = F.pad(both[..., latent.nope_size :], (0, padded - latent.value_size))
        out = attend(F.pad(queries, (0, padded - size)), keys, values)
        return out.view(count, heads, padded)[..., : latent.value_size]

    def _unscaled(self, size: int) -> float:
        """What takes back that `attend` scales by size^-0.5, and scales as this model does."""
        return self.latent.scale * size**0.5


class LatentAttention:
    """The attention of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Weights, dtype: torch.dtype) -> None:
        assert spec.latent is not None, "a latent layer of a model without latents"
        latent, prefix = spec.latent, f"layers.{layer}."

        def vector(name: str) -> Tensor:
            return dense(weights, prefix + name).to(dtype)

        def bias(name: str) -> Tensor | None:
            return vector(f"{name}.bias") if spec.attention_bias else None

        self.q_down: tuple[Weight, Tensor | None] | None = None
        if latent.query_rank:
            self.q_down = weights(prefix + "q_a_proj"), bias("q_a_proj")
            self.q_norm = vector("q_a_norm")
        self.q_up = weights(prefix + ("q_b_proj" if latent.query_rank else "q_proj"))
        self.down = weights(prefix + "kv_a_proj"), bias("kv_a_proj")
        self.norm = vector("kv_a_norm")
        self.out = weights(prefix + "o_proj"), bias("o_proj")
        kv_b = _matrix(weights(prefix + "kv_b_proj"), dtype).view(spec.num_heads, -1, latent.rank)
        self.heads = LatentHeads(layer, spec.rope.kind, latent, kv_b)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """hidden [T, H], already normalised -> [T, H]."""
        queries = hidden
        if self.q_down is not None:
            queries = rms_norm(_project(hidden, *self.q_down), self.q_norm, _EPS)
        queries = linear(queries, self.q_up).unflatten(-1, (self.heads.kv_b.shape[0], -1))
        latents = _project(hidden, *self.down)  # [T, R + P]
        rank = self.heads.latent.rank
        latents = torch.cat(
            (rms_norm(latents[:, :rank].contiguous(), self.norm, _EPS), latents[:, rank:]), dim=-1
        )
        return _project(step.attend_latents(self.heads, queries, latents), *self.out)


def _project(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    out = linear(x, weight)
    return out if bias is None else out + bias


def _matrix(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`.

    Absorbed, its key half is multiplied from the other side, over rows of the stored matrix: scales
    belong to groups within a row, so no kernel of packed integers can do that, and to expand it for
    each token would take more than to multiply by it. So it is held in the dtype of computing; the
    plan counts it so (`DenseTensor.expanded`), while the file keeps the layout that others read.
    """
    assert not isinstance(weight, BnbWeight), "a matrix to absorb in a scheme of bitsandbytes"
    return dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
