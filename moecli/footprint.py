"""Knows how many bytes each part of a model takes, from its spec or outline and schemes alone."""

from moecli.config import KV_DTYPES, RUN_SCHEMES
from moecli.models.config import MOST_TILES, DenseTensor, ModelSpec, VisionSpec
from moecli.models.latent_sizes import workspace_numel
from moecli.models.outline import Counted, Outline, Own
from offload.plan import ModelFootprint
from quant.layout import SLOT_ALIGNMENT, ExpertLayout
from quant.scheme import QuantScheme

_KV_ITEMSIZES = {"auto": (2, 0), "bf16": (2, 0), "int8": (1, 2)}  # of a number, and of a scale
STORED_ITEMSIZE = 2  # router, norms, embeddings: 16 bits
COMPUTE_ITEMSIZE = 4  # activations are fp32, and what must not be rounded
_BNB_BLOCK, _BNB_NESTED_BLOCK = 64, 256  # of bitsandbytes' NF4 with double quantization


def expert_layout(spec: Counted, scheme: QuantScheme) -> ExpertLayout:
    return ExpertLayout(spec.hidden_size, spec.expert_intermediate_size, scheme)


def expert_nbytes(spec: Counted, scheme: QuantScheme | None) -> int:
    """Bytes of one routed expert, its biases in 16 bits; `scheme` None: 16 bits throughout."""
    if scheme is None:
        return STORED_ITEMSIZE * spec.expert_numel
    biases = spec.expert_bias_numel if isinstance(spec, Outline) else 0
    return expert_layout(spec, scheme).nbytes + STORED_ITEMSIZE * biases


def stored_nbytes(
    spec: Counted, scheme: QuantScheme | None, dense_scheme: QuantScheme | None
) -> int:
    """Bytes of all weights in a checkpoint, a vision tower in 16 bits included."""
    dense = sum(stored_tensor_nbytes(tensor, dense_scheme) for tensor in spec.dense_tensors)
    experts = len(spec.moe_layers) * spec.num_experts * expert_nbytes(spec, scheme)
    return dense + experts + STORED_ITEMSIZE * spec.num_vision_params


def tensor_nbytes(
    tensor: DenseTensor, scheme: QuantScheme | None, run_scheme: str = "stored"
) -> int:
    """Bytes in memory of a tensor outside the routed experts; `scheme` as it is stored in.

    `run_scheme` nf4 or llm-int8: what bitsandbytes keeps of it once it is opened.
    """
    assert run_scheme in RUN_SCHEMES, f"no dense scheme is called {run_scheme}"
    if tensor.exact or tensor.expanded:
        return COMPUTE_ITEMSIZE * tensor.numel
    if not tensor.linear:
        return STORED_ITEMSIZE * tensor.numel
    if run_scheme == "llm-int8":
        return tensor.numel + 4 * tensor.shape[0]  # a byte a weight, and an fp32 scale a row
    if run_scheme == "nf4":
        return _nf4_nbytes(tensor.numel)
    return stored_tensor_nbytes(tensor, scheme)


def stored_tensor_nbytes(tensor: DenseTensor, scheme: QuantScheme | None) -> int:
    """Bytes in a checkpoint of a tensor outside the routed experts; None: 16 bits throughout."""
    if scheme is None or not tensor.linear:
        return STORED_ITEMSIZE * tensor.numel
    rows, columns = tensor.shape
    return scheme.packed_nbytes(rows, columns) + scheme.scale_nbytes(rows, columns)


def _nf4_nbytes(numel: int) -> int:
    """Half bytes, a byte a block for its scale, and fp32 scales, a table and an offset of those."""
    blocks = -(-numel // _BNB_BLOCK)
    return -(-numel // 2) + blocks + 4 * (-(-blocks // _BNB_NESTED_BLOCK) + 256 + 1)


def workspace_nbytes(spec: Counted, ctx: int, prefill_chunk: int) -> int:
    """Most bytes of activations that are alive at once while a chunk of prompt passes a layer.

    Hidden states, their norm and the residual; queries, keys, values and the attended result;
    scores of one block; the choices' contributions twice (total and wave); one expert's inner
    activations for every token; and the logits of a token. A picture passes its tower before its
    tokens do: what the tower takes counts where it is more, and what it leaves on top of that.
    """
    if not isinstance(spec, Own):
        return spec.workspace_nbytes(ctx, prefill_chunk)
    tokens = min(prefill_chunk, ctx)
    inner = max(
        spec.expert_intermediate_size, spec.shared_intermediate_size, spec.dense_intermediate_size
    )
    a_token = 4 * spec.hidden_size + 2 * spec.experts_per_token * spec.hidden_size
    a_token += 3 * inner
    numel = tokens * a_token + _attention_numel(spec, tokens, ctx) + 2 * spec.vocab_size
    text = COMPUTE_ITEMSIZE * numel
    if not isinstance(spec, ModelSpec) or spec.vision is None:
        return text
    most = 2 * (MOST_TILES + 1) * spec.vision.tile_tokens  # patches of two pictures in a chunk
    embeddings = COMPUTE_ITEMSIZE * min(most, ctx) * spec.hidden_size
    return max(text, tower_nbytes(spec.vision, spec.hidden_size)) + embeddings


def tower_nbytes(vision: VisionSpec, text_hidden: int) -> int:
    """Most bytes that are alive at once while a picture of the most tiles passes a vision tower.

    Pixels as they are made and as they are taken, hidden states twice, the weights of the largest
    part and one of its tensors as it was stored, one tile's activations, results twice.
    """
    tiles, patches = MOST_TILES + 1, vision.patches + 1
    hidden, inner = vision.hidden_size, vision.intermediate_size
    adapter_in, between, adapter_out = vision.adapter_sizes
    largest = max(
        4 * hidden * hidden + 2 * hidden * inner,
        adapter_in * between + adapter_out * adapter_out,
        adapter_out * text_hidden,
    )
    stored = max(hidden * inner, adapter_in * between, adapter_out * text_hidden)
    pixels = tiles * 3 * vision.tile_size**2
    states = 2 * tiles * patches * hidden
    a_tile = patches * (8 * hidden + 2 * inner)
    results = 2 * tiles * vision.tile_tokens * max(adapter_out, text_hidden)
    passing = pixels + states + largest + a_tile + results
    return COMPUTE_ITEMSIZE * passing + STORED_ITEMSIZE * (stored + 2 * pixels)


def _attention_numel(spec: Own, tokens: int, ctx: int) -> int:
    if isinstance(spec, ModelSpec) and spec.latent is not None:
        return workspace_numel(spec.latent, spec.num_heads, tokens, ctx)
    return tokens * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim


def kv_nbytes(spec: Counted, ctx: int, prefill_chunk: int, kv_dtype: str) -> int:
    """Bytes of a KV cache; `kv_dtype` is EngineConfig's."""
    assert kv_dtype in KV_DTYPES, f"no dtype of a KV cache is called {kv_dtype}"
    if not isinstance(spec, Own):
        return spec.cache_nbytes(ctx, prefill_chunk)
    return spec.kv_nbytes(ctx, *_KV_ITEMSIZES[kv_dtype])


def expanded_nbytes(spec: Counted, ctx: int, kv_dtype: str) -> int:
    """What a chunk of prompt needs besides where the KV cache is int8: one layer of it in bf16."""
    if kv_dtype != "int8" or not isinstance(spec, Own):
        return 0
    longest = max(spec.kv_capacity(layer, ctx) for layer in range(spec.num_layers))
    return 2 * spec.num_kv_heads * spec.head_dim * STORED_ITEMSIZE * longest


def device_workspace_nbytes(spec: Counted, ctx: int, prefill_chunk: int) -> int:
    """The same where a device computes: all choices' inner activations are alive at once there."""
    inner = min(prefill_chunk, ctx) * spec.experts_per_token * spec.expert_intermediate_size
    return workspace_nbytes(spec, ctx, prefill_chunk) + COMPUTE_ITEMSIZE * inner


def _expert_bias_nbytes(spec: Counted) -> int:
    """Bytes of all experts' biases where those are tensors of their own, in fp32."""
    if not isinstance(spec, ModelSpec) or not spec.expert_bias:
        return 0
    found = [tensor.numel for tensor in spec.dense_tensors if ".experts." in tensor.name]
    return COMPUTE_ITEMSIZE * sum(found)


def codes_nbytes(spec: Counted, tokens: int) -> int:
    """Most bytes of activations as the processor's kernels take them, which they keep from call to
    call: a byte a number and eight for the scales of 32, of every choice of `tokens` tokens before
    and inside its expert, or of every token before the widest of the other linears.
    """
    choice = spec.experts_per_token * (spec.hidden_size + spec.expert_intermediate_size)
    linears = (tensor.shape[1] for tensor in spec.dense_tensors if tensor.linear)
    return tokens * max(choice, max(linears, default=0)) * 5 // 4


def active_weights(spec: Counted) -> int:
    """Weights that a token of a prompt is multiplied with: the last one alone meets the head."""
    linears = sum(t.numel for t in spec.dense_tensors if t.linear and "lm_head" not in t.name)
    return linears + len(spec.moe_layers) * spec.experts_per_token * spec.expert_numel


def model_footprint(
    spec: Counted,
    scheme: QuantScheme,
    dense_scheme: QuantScheme | None,
    ctx: int,
    prefill_chunk: int,
    run_scheme: str = "stored",
    kv_dtype: str = "auto",
) -> ModelFootprint:
    """The sizes that a placement is planned from.

    `run_scheme` is EngineConfig.dense_scheme, `kv_dtype` its namesake there.
    """
    expert = expert_nbytes(spec, scheme)
    biased = isinstance(spec, Outline) and spec.expert_bias  # its rows are of different sizes
    embedding = 0
    if not spec.tie_word_embeddings:  # a tied one is read whole, as the head
        embedding = STORED_ITEMSIZE * spec.vocab_size * spec.hidden_size
    dense = sum(tensor_nbytes(tensor, dense_scheme, run_scheme) for tensor in spec.dense_tensors)
    return ModelFootprint(
        dense_nbytes=dense - embedding,
        embedding_nbytes=embedding,
        kv_nbytes=kv_nbytes(spec, ctx, prefill_chunk, kv_dtype),
        workspace_nbytes=workspace_nbytes(spec, ctx, prefill_chunk)
        + expanded_nbytes(spec, ctx, kv_dtype)
        + codes_nbytes(spec, min(prefill_chunk, ctx)),
        num_moe_layers=len(spec.moe_layers),
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_nbytes=expert,
        slot_nbytes=-(-expert // SLOT_ALIGNMENT) * SLOT_ALIGNMENT,
        intermediate_size=0 if biased else spec.expert_intermediate_size,
        group_size=scheme.group_size,
        device_workspace_nbytes=device_workspace_nbytes(spec, ctx, prefill_chunk),
        prefill_tokens=min(prefill_chunk, ctx),
        host_bias_nbytes=_expert_bias_nbytes(spec),
        active_weights=active_weights(spec),
    )
