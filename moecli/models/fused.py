"""Knows the small operations between matrix products: schema, shape function, reference, backend.

Legend: T tokens, H hidden, D head size, N query heads, K key heads, C slots of a layer's cache,
E experts, k experts a token.

CPU tensors take the references, plain PyTorch, and CUDA tensors the Triton kernels, unless
`set_backend` says otherwise. None of these operations waits for the device or depends on a Python
value that changes from step to step, so a step made of them can be captured.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.errors import MoecliError

_SCORES_NBYTES = 64 << 20  # of plain attention, at once
BACKENDS = ("auto", "reference", "triton")
_backend = "auto"


def set_backend(name: str) -> None:
    """Choose who computes from now on, in every thread."""
    global _backend
    if name not in BACKENDS:
        raise MoecliError(f"no kernels are called `{name}`", f"use one of {', '.join(BACKENDS)}")
    _backend = name


def current_backend() -> str:
    return _backend


def takes_kernels(x: Tensor) -> bool:
    """Whether what torch alone can do on the processor is an operation here where `x` lies."""
    return not x.is_cpu or _backend == "triton"


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalised in fp32 over the last dimension, cast back, then multiplied by the weight.

    Shapes: x [..., R, D], weight [D] or [R, D].
    """
    result: Tensor = torch.ops.moecli.rms_norm(x, weight, eps)
    return result


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Adds `delta` to `residual`, in place, and gives the sum's `rms_norm`. All [T, H]."""
    result: Tensor = torch.ops.moecli.add_rms_norm(residual, delta, weight, eps)
    return result


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape."""
    result: Tensor = torch.ops.moecli.silu_mul(gate, up)
    return result


def choose_experts(logits: Tensor, top_k: int, kind: str, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> ids int64 [T, k], the most wanted first, and weights [T, k] in their dtype.

    `kind` makes numbers weights: "sigmoid" of each, "softmax" of all, or "softmax_of_chosen".
    `normalize`: those of a token add up to 1.
    """
    result: tuple[Tensor, Tensor] = torch.ops.moecli.choose_experts(logits, top_k, kind, normalize)
    return result


def rotate_and_store(
    q: Tensor,  # [1, N, D]
    k: Tensor,  # [1, K, D]
    v: Tensor,  # [1, K, D]
    turns: Tensor,  # complex64 [1, R / 2]
    temperature: Tensor | None,  # fp32 [1, 1, 1]
    norm_weight: Tensor | None,  # [N + K, D]
    rope: str,
    norm: str,
    eps: float,
    slot: Tensor,  # int64 [1]: this token's
    keys_values: Tensor,  # [2, K, C, D]
) -> Tensor:
    """`position_heads` of one token, whose key and value are then stored in their slot.

    Gives the queries [1, N, D] in the dtype of the cache.
    """
    rules = (turns, temperature, norm_weight, rope, norm, eps)
    result: Tensor = torch.ops.moecli.rotate_and_store(q, k, v, *rules, slot, keys_values)
    return result


def decode_attention(
    q: Tensor,
    keys_values: Tensor,
    length: Tensor,
    splits: int,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one token over the slots 0 to length - 1, scaled by D^-0.5.

    Shapes: q [1, N, D], keys_values [2, K, C, D], length int64 [1], sinks fp32 [N]; returns
    [1, N * D] in `dtype`. A sink is a score that takes weight and gives no value. The kernel
    divides the length into `splits` parts that are computed side by side.
    """
    op = torch.ops.moecli.decode_attention
    result: Tensor = op(q, keys_values, length, splits, dtype, sinks)
    return result


def decode_latents(
    q: Tensor,
    latents: Tensor,
    length: Tensor,
    splits: int,
    rank: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Attention of one token over latents in the slots 0 to length - 1, scaled by `scale`.

    Shapes: q [1, N, R + P] and latents [C, R + P] in one dtype, length int64 [1]; returns [1, N, R]
    in `dtype`: the last P numbers of what is kept are no part of a value.
    """
    op = torch.ops.moecli.decode_latents
    result: Tensor = op(q, latents, length, splits, rank, scale, dtype)
    return result


def windowed_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Causal attention of the last T of L tokens that see as many as `window`; None: all.

    Shapes: q [T, N, D], keys and values [K, L, D], sinks fp32 [N]; returns [T, N * D], all in one
    dtype, scaled by D^-0.5.
    """
    result: Tensor = torch.ops.moecli.windowed_attention(q, keys, values, window, sinks)
    return result


def gather_rows(address: Tensor, ids: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Rows of a table [V, H] of `dtype` whose address the device can read, wherever it lies.

    Shapes: address int64 [1], ids int64 [T] below V, which nothing checks; returns [T, H].
    """
    result: Tensor = torch.ops.moecli.gather_rows(address, ids, hidden_size, dtype)
    return result


def rotate(x: Tensor, turns: Tensor, rope: str) -> Tensor:
    """x [T, heads, D], its first R components turned by complex numbers [T, R / 2], in fp32."""
    size = 2 * turns.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], turns, rope), x[..., size:]), dim=-1)
    y = x.float()
    if rope == "interleaved":
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)
    cos = torch.cat((turns.real, turns.real), dim=-1)[:, None]
    sin = torch.cat((-turns.imag, turns.imag), dim=-1)[:, None]
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def position_heads(
    q: Tensor,  # [T, N, D]
    k: Tensor,  # [T, K, D]
    turns: Tensor,  # complex64 [T, R / 2]
    temperature: Tensor | None,  # fp32 [T, 1, 1], of the queries
    norm_weight: Tensor | None,  # [N + K, D]
    rope: str,  # "interleaved", "half" or "none"
    norm: str,  # "before", "after" or "none"
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k with RoPE, q/k norms and temperature.

    Norms and RoPE treat queries and keys alike, so they go through them as one.
    """
    qk = torch.cat((q, k), dim=1)
    if norm == "before":
        qk = _rms_norm(qk, norm_weight, eps)
    if rope != "none":
        qk = rotate(qk, turns, rope)
    if norm == "after":
        qk = _rms_norm(qk, norm_weight, eps)
    q, k = qk.split((q.shape[1], k.shape[1]), dim=1)
    return (q if temperature is None else (q * temperature).to(q.dtype)), k


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    return normed if weight is None else normed * weight


def _rms_norm_shape(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


def _add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _rms_norm(residual.add_(delta), weight, eps)


def _add_rms_norm_shape(
    residual: Tensor, delta: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    return torch.empty_like(residual)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _silu_mul_shape(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _choose_experts(
    logits: Tensor, top_k: int, kind: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    if kind in ("sigmoid", "softmax_of_chosen"):
        chosen, ids = logits.topk(top_k, dim=-1)
        chosen = chosen.float()
        weights = chosen.sigmoid() if kind == "sigmoid" else chosen.softmax(dim=-1)
    else:
        weights, ids = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights.to(logits.dtype)


def _choose_experts_shape(
    logits: Tensor, top_k: int, kind: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


def _rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turns: Tensor,
    temperature: Tensor | None,
    norm_weight: Tensor | None,
    rope: str,
    norm: str,
    eps: float,
    slot: Tensor,
    keys_values: Tensor,
) -> Tensor:
    q, k = position_heads(q, k, turns, temperature, norm_weight, rope, norm, eps)
    new = torch.stack((k[0], v[0]))[:, :, None]  # [2, K, 1, D]
    keys_values.index_copy_(2, slot, new.to(keys_values.dtype))
    return q.to(keys_values.dtype, copy=True)


def _rotate_and_store_shape(q: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(q, dtype=args[-1].dtype)


def _decode_attention(
    q: Tensor,
    keys_values: Tensor,
    length: Tensor,
    splits: int,
    dtype: torch.dtype,
    sinks: Tensor | None,
) -> Tensor:
    """Looks at all slots, those beyond the length masked: what they hold may be no number."""
    _, kv_heads, capacity, size = keys_values.shape
    seen = torch.arange(capacity, device=q.device) < length  # [C]
    keys, values = keys_values.masked_fill(~seen[:, None], 0)  # [K, C, D]
    grouped = q.view(kv_heads, -1, size)
    if sinks is not None:
        out = with_sinks(grouped, keys, values, seen[None], sinks.view(kv_heads, -1, 1))
    else:
        out = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=seen[None]
        )
    return out.reshape(1, -1).to(dtype, copy=True)


def with_sinks(
    rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor, sinks: Tensor | None
) -> Tensor:
    """Attention said plainly, in fp32: each row's scores, and its sink's, through one softmax.

    Shapes: rows [..., M, D], keys and values [..., L, D], seen bool [M, L] and sinks [..., M, 1] as
    they broadcast; returns [..., M, D] in the rows' dtype.
    """
    scores = rows.float() @ keys.float().mT * rows.shape[-1] ** -0.5  # [..., M, L]
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return (weights @ values.float()).to(rows.dtype)


def _decode_attention_shape(
    q: Tensor,
    keys_values: Tensor,
    length: Tensor,
    splits: int,
    dtype: torch.dtype,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty(1, q.shape[1] * q.shape[2], dtype=dtype)


def _decode_latents(
    q: Tensor,
    latents: Tensor,
    length: Tensor,
    splits: int,
    rank: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """As `_decode_attention`, with one key and value for all heads."""
    seen = torch.arange(latents.shape[0], device=q.device) < length  # [C]
    kept = latents.masked_fill(~seen[:, None], 0).float()  # [C, R + P]
    scores = (q[0].float() @ kept.mT * scale).masked_fill(~seen, -torch.inf)  # [N, C]
    return (scores.softmax(-1) @ kept[:, :rank])[None].to(dtype)


def _decode_latents_shape(
    q: Tensor,
    latents: Tensor,
    length: Tensor,
    splits: int,
    rank: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty(1, q.shape[1], rank, dtype=dtype)


def _windowed_attention(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Some tokens at once, so that their scores take no more than _SCORES_NBYTES."""
    (count, heads, size), (kv_heads, length, _) = q.shape, keys.shape
    rows = q.view(count, kv_heads, -1, size).permute(1, 2, 0, 3)  # [K, N / K, T, D]
    of_rows = None if sinks is None else sinks.view(kv_heads, -1, 1, 1)
    at_once = max(1, _SCORES_NBYTES // (4 * heads * length))
    pieces, slots = [], torch.arange(length, device=q.device)
    for first in range(0, count, at_once):
        part = rows[:, :, first : first + at_once]
        begin = length - count + first
        places = torch.arange(begin, begin + part.shape[2], device=q.device)[:, None]
        seen = slots <= places if window is None else (slots <= places) & (slots > places - window)
        pieces.append(with_sinks(part, keys[:, None], values[:, None], seen, of_rows))
    return torch.cat(pieces, dim=2).permute(2, 0, 1, 3).reshape(count, -1)


def _windowed_attention_shape(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def _gather_rows(address: Tensor, ids: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Reads where the host can read too; waits for the device, which a captured step must not."""
    nbytes, base = hidden_size * dtype.itemsize, int(address.item())
    out = torch.empty(ids.shape[0], hidden_size, dtype=dtype)
    for row, token in enumerate(ids.tolist()):
        ctypes.memmove(out.data_ptr() + row * nbytes, base + token * nbytes, nbytes)
    return out.to(ids.device)


def _gather_rows_shape(
    address: Tensor, ids: Tensor, hidden_size: int, dtype: torch.dtype
) -> Tensor:
    return ids.new_empty(ids.shape[0], hidden_size, dtype=dtype)


def _kernel(name: str, default: str) -> Callable[..., Any]:
    from moecli.models.kernels import heads, latents, prompt, rows

    if default == "reference" and not rows.INTERPRETED:
        raise MoecliError(
            "Triton's kernels need a CUDA device",
            "leave out `--kernels triton`, or set TRITON_INTERPRET=1 to test them slowly",
        )
    kernel: Callable[..., Any] = next(
        getattr(module, name) for module in (rows, heads, latents, prompt) if hasattr(module, name)
    )
    return kernel


def _dispatcher(name: str, reference: Callable[..., Any], default: str) -> Callable[..., Any]:
    """The op on one kind of device, where `default` is what "auto" means.

    Raises MoecliError where the kernels are wanted and can run neither there nor in an interpreter.
    """

    def compute(*args: Any) -> Any:
        backend = default if _backend == "auto" else _backend
        return _kernel(name, default)(*args) if backend == "triton" else reference(*args)

    return compute


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor": (_rms_norm, _rms_norm_shape),
    "add_rms_norm(Tensor(a!) residual, Tensor delta, Tensor? weight, float eps) -> Tensor": (
        _add_rms_norm,
        _add_rms_norm_shape,
    ),
    "choose_experts(Tensor logits, int top_k, str kind, bool normalize) -> (Tensor, Tensor)": (
        _choose_experts,
        _choose_experts_shape,
    ),
    "silu_mul(Tensor gate, Tensor up) -> Tensor": (_silu_mul, _silu_mul_shape),
    "rotate_and_store(Tensor q, Tensor k, Tensor v, Tensor turns, Tensor? temperature, "
    "Tensor? norm_weight, str rope, str norm, float eps, Tensor slot, Tensor(a!) keys_values) "
    "-> Tensor": (_rotate_and_store, _rotate_and_store_shape),
    "decode_attention(Tensor q, Tensor keys_values, Tensor length, int splits, ScalarType dtype, "
    "Tensor? sinks) -> Tensor": (_decode_attention, _decode_attention_shape),
    "decode_latents(Tensor q, Tensor latents, Tensor length, int splits, int rank, float scale, "
    "ScalarType dtype) -> Tensor": (_decode_latents, _decode_latents_shape),
    "windowed_attention(Tensor q, Tensor keys, Tensor values, int? window, Tensor? sinks) "
    "-> Tensor": (_windowed_attention, _windowed_attention_shape),
    "gather_rows(Tensor address, Tensor ids, int hidden_size, ScalarType dtype) -> Tensor": (
        _gather_rows,
        _gather_rows_shape,
    ),
}
_library = torch.library.Library("moecli", "FRAGMENT")
for _schema, (_reference, _shape) in _OPS.items():
    _name = _library.define(_schema)
    for _key, _default in (("CPU", "reference"), ("CUDA", "triton")):
        _library.impl(_name, _dispatcher(_name, _reference, _default), _key)
    torch.library.register_fake(f"moecli::{_name}", _shape, lib=_library)
