"""Knows the demo model's forward pass for training: Llama 4 text, packed documents.

It does not know data, optimisation or files. Documents lie one after another in a flat batch of N
tokens: every layer but attention is token-wise, attention runs per document (or per chunk of one),
and a token visits only the expert it is routed to.

Legend: N tokens, D hidden, H heads, G kv heads, C head size, E experts, I expert width, V words.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 3840
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    intermediate_size: int = 128
    chunk_size: int = 256
    nope_interval: int = 4
    rope_theta: float = 10000.0
    max_positions: int = 2048
    rms_norm_eps: float = 1e-5

    def uses_rope(self, layer: int) -> bool:
        return (layer + 1) % self.nope_interval != 0

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """A flat batch: where each document (and each chunk of one) ends is given by its length."""

    tokens: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64, next token
    weights: torch.Tensor  # [N] fp32, 0 where nothing is to be predicted
    positions: torch.Tensor  # [N] int64, from 0 in each document
    doc_lengths: list[int]
    chunk_lengths: list[int]
    real: torch.Tensor | None = None  # [N] fp32, 0 for padding, which counts in no expert's load

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.tokens, self.targets, self.weights, self.positions)
        real = None if self.real is None else self.real.to(device)
        return Batch(*(t.to(device) for t in tensors), self.doc_lengths, self.chunk_lengths, real)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight.to(x.dtype)


def rope_and_norm(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """Rotate interleaved pairs, then weightless RMS norm. x [N, heads, C]; cos, sin [N, C/2]."""
    y = x.float().unflatten(-1, (-1, 2))
    even, odd = y[..., 0], y[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    rotated = rotated * torch.rsqrt(rotated.pow(2).mean(-1, keepdim=True) + eps)
    return rotated.to(x.dtype)


def padded_groups(expert: torch.Tensor, counts: torch.Tensor, multiple: int = 64):
    """Group tokens by expert, each group padded to one of few sizes: kernels are cached per size.

    Returns the group sizes, the token of each padded row [P] and the row of each token [N].
    """
    sizes = (counts + multiple - 1) // multiple * multiple
    ends = sizes.cumsum(0)
    order = expert.argsort(stable=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(expert), device=expert.device) - first[expert[order]]
    place = (ends - sizes)[expert[order]] + rank
    rows = torch.zeros(int(ends[-1]), dtype=torch.int64, device=expert.device)
    rows[place] = order
    slots = torch.empty_like(order).scatter_(0, order, place)
    return sizes.tolist(), rows, slots


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


class FusedHeadLoss(torch.autograd.Function):
    """Cross entropy against the tied embedding, in slices: [N, V] logits never exist at once."""

    @staticmethod
    def forward(ctx, hidden, embedding, targets, weights, slice_size):
        table = embedding.to(hidden.dtype)  # [V, D]
        grad_hidden = torch.zeros_like(hidden)
        grad_table = torch.zeros(embedding.shape, dtype=torch.float32, device=hidden.device)
        losses = torch.zeros(len(targets), device=hidden.device)
        total = weights.sum().clamp_min(1e-6)
        for start in range(0, len(targets), slice_size):
            span = slice(start, start + slice_size)
            h, target = hidden[span], targets[span]
            logits = (h @ table.t()).float()  # [n, V]
            log_sum = logits.logsumexp(-1)
            losses[span] = log_sum - logits.gather(1, target[:, None])[:, 0]
            share = weights[span] / total
            grad = logits.sub_(log_sum[:, None]).exp_().mul_(share[:, None])
            grad.scatter_add_(1, target[:, None], -share[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[span] = grad @ table
            grad_table += (grad.t() @ h).float()
        ctx.save_for_backward(grad_hidden, grad_table)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum() / total, losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_table = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_table * grad_loss, None, None, None


class SegmentAttention(torch.autograd.Function):
    """Causal attention inside each segment of a flat batch; queries of a kv head lie side by side.

    q [N, H, C], k, v [N, G, C] -> [N, H * C]. On a CPU this beats the flash kernel at such lengths.
    """

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        saved, start = [], 0
        for length in lengths:
            span = slice(start, start + length)
            q_part = fold_queries(q[span], groups)  # [G, H/G * L, C]
            k_part, v_part = (t[span].transpose(0, 1) for t in (k, v))  # [G, L, C]
            score = torch.bmm(q_part, k_part.mT).unflatten(1, (-1, length))
            score = score.float().mul_(scale).add_(causal_bias(length, q.device))
            probability = score.softmax(-1).to(q.dtype).flatten(1, 2)  # [G, H/G * L, L]
            out[span] = unfold_queries(torch.bmm(probability, v_part), length)
            saved.append(probability)
            start += length
        ctx.save_for_backward(q, k, v, *saved)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, *saved = ctx.saved_tensors
        groups, scale = k.shape[1], q.shape[-1] ** -0.5
        grad_out = grad_out.unflatten(1, q.shape[1:])
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        start = 0
        for length, probability in zip(ctx.lengths, saved, strict=True):
            span = slice(start, start + length)
            start += length
            grad = fold_queries(grad_out[span], groups)  # [G, H/G * L, C]
            k_part, v_part = (t[span].transpose(0, 1) for t in (k, v))
            grad_v[span] = torch.bmm(probability.mT, grad).transpose(0, 1)
            grad_p = torch.bmm(grad, v_part.mT).float()
            weighted = grad_p.mul_(probability)
            inner = weighted.sum(-1, keepdim=True)
            grad_s = weighted.addcmul_(probability, inner, value=-1.0).mul_(scale).to(q.dtype)
            q_grad = torch.bmm(grad_s, k_part)
            grad_q[span] = unfold_queries(q_grad, length).unflatten(1, q.shape[1:])
            grad_k[span] = torch.bmm(grad_s.mT, fold_queries(q[span], groups)).transpose(0, 1)
        return grad_q, grad_k, grad_v, None


def fold_queries(q: torch.Tensor, groups: int) -> torch.Tensor:
    """[L, H, C] -> [G, H/G * L, C]."""
    return q.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def unfold_queries(x: torch.Tensor, length: int) -> torch.Tensor:
    """[G, H/G * L, C] -> [L, H * C]."""
    return x.unflatten(1, (-1, length)).permute(2, 0, 1, 3).flatten(1)


@lru_cache(maxsize=256)
def causal_bias(length: int, device: torch.device) -> torch.Tensor:
    return torch.full((length, length), float("-inf"), device=device).triu_(1)


class Layer(nn.Module):
    """One block. Matrices are stored [out, in] as the checkpoint has them, experts [E, in, out]."""

    def __init__(self, config: DemoConfig, index: int, ops):
        super().__init__()
        c, self.config, self.ops = config, config, ops
        self.rope = c.uses_rope(index)
        width_q, width_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.input_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.post_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.qkv = nn.Parameter(torch.empty(width_q + 2 * width_kv, c.hidden_size))
        self.o = nn.Parameter(torch.empty(c.hidden_size, width_q))
        self.router = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))
        self.gate_up = nn.Parameter(
            torch.empty(c.num_experts, c.hidden_size, 2 * c.intermediate_size)
        )
        self.down = nn.Parameter(torch.empty(c.num_experts, c.intermediate_size, c.hidden_size))
        self.shared_gate_up = nn.Parameter(torch.empty(2 * c.intermediate_size, c.hidden_size))
        self.shared_down = nn.Parameter(torch.empty(c.hidden_size, c.intermediate_size))

    def attention(self, x: torch.Tensor, batch: Batch, cos, sin) -> torch.Tensor:
        c = self.config
        qkv = x @ self.qkv.t()  # [N, (H + 2G) * C]
        q, k, v = qkv.unflatten(-1, (-1, c.head_dim)).split(
            [c.num_heads, c.num_kv_heads, c.num_kv_heads], 1
        )
        lengths = batch.doc_lengths
        if self.rope:
            qk = self.ops.rope_and_norm(
                qkv[:, : -c.num_kv_heads * c.head_dim].unflatten(-1, (-1, c.head_dim)),
                cos,
                sin,
                c.rms_norm_eps,
            )
            q, k = qk.split([c.num_heads, c.num_kv_heads], 1)
            lengths = batch.chunk_lengths
        return SegmentAttention.apply(q, k, v, lengths) @ self.o.t()

    def moe(
        self, x: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = x @ self.router.t()  # [N, E]
        top, expert = logits.max(-1)
        counts = torch.bincount(expert, minlength=self.config.num_experts)
        sizes, rows, slots = padded_groups(expert, counts)
        score = torch.sigmoid(top.float()).to(x.dtype)
        routed = (x * score[:, None]).index_select(0, rows).split(sizes)
        out = [
            self.ops.silu_mul(part @ gate_up) @ down
            for part, gate_up, down in zip(
                routed, self.gate_up.unbind(), self.down.unbind(), strict=True
            )
            if len(part)
        ]
        shared = self.ops.silu_mul(x @ self.shared_gate_up.t()) @ self.shared_down.t()
        share = torch.ones(len(x), device=x.device) if real is None else real
        share = share / share.sum()
        load = torch.zeros_like(logits[0], dtype=torch.float32).index_add_(0, expert, share)  # [E]
        probability = share @ logits.float().softmax(-1)  # [E]
        balance = self.config.num_experts * (load * probability).sum()
        return shared + torch.cat(out).index_select(0, slots), load, balance

    def forward(self, x, batch, cos, sin):
        eps = self.config.rms_norm_eps
        x = x + self.attention(self.ops.rms_norm(x, self.input_norm, eps), batch, cos, sin)
        y, load, balance = self.moe(self.ops.rms_norm(x, self.post_norm, eps), batch.real)
        return x + y, load, balance


class Ops:
    """The pointwise pieces, compiled or not."""

    def __init__(self, compiled: bool):
        wrap = (lambda f: torch.compile(f, dynamic=True)) if compiled else (lambda f: f)
        self.rms_norm = wrap(rms_norm)
        self.rope_and_norm = wrap(rope_and_norm)
        self.silu_mul = wrap(silu_mul)


class DemoModel(nn.Module):
    def __init__(self, config: DemoConfig, *, compiled: bool = False):
        super().__init__()
        self.config = config
        self.ops = Ops(compiled)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, i, self.ops) for i in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))

    def init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if param.dim() == 1:
                continue
            fan_in = param.shape[-2] if param.dim() == 3 else param.shape[-1]
            std = {"embedding": 0.04, "router": 0.02}.get(leaf, fan_in**-0.5)
            if leaf in ("o", "down", "shared_down"):
                std *= 0.2
            with torch.no_grad():
                param.copy_(torch.randn(param.shape, generator=generator) * std)

    def rope_tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        exponent = torch.arange(0, c.head_dim, 2, device=positions.device) / c.head_dim
        angle = positions[:, None].float() * c.rope_theta**-exponent  # [N, C/2]
        return angle.cos(), angle.sin()

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final hidden states [N, D], expert load [layers, E], balance loss [layers]."""
        x = F.embedding(batch.tokens, self.embedding).to(self.layers[0].o.dtype)
        cos, sin = self.rope_tables(batch.positions)
        loads, balances = [], []
        for layer in self.layers:
            x, load, balance = layer(x, batch, cos, sin)
            loads.append(load)
            balances.append(balance)
        x = self.ops.rms_norm(x, self.norm, self.config.rms_norm_eps)
        return x, torch.stack(loads), torch.stack(balances)

    def forward(self, batch: Batch, slice_size: int = 1024):
        """Weighted mean loss, per-token losses [N], expert load, balance loss."""
        x, loads, balances = self.hidden(batch)
        loss, losses = FusedHeadLoss.apply(
            x, self.embedding, batch.targets, batch.weights, slice_size
        )
        return loss, losses, loads, balances
