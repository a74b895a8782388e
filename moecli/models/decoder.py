"""Knows how the layers of a text decoder follow each other; not where its experts lie.

Legend of the shapes: T tokens of all sequences end to end, S sequences, H hidden, V vocabulary.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.attention import Attention, BatchStep, Step, StepMaker, Weights, dense
from moecli.models.batch import Batch, Patches, SequenceSlice
from moecli.models.config import ModelSpec
from moecli.models.device_step import DeviceStep
from moecli.models.few_tokens import FewTokens
from moecli.models.fused import add_rms_norm, gather_rows, rms_norm
from moecli.models.latent import LatentAttention
from moecli.models.moe import Mlp, MoeBlock
from moecli.models.provider import ExpertProvider
from quant.kernels.cpu.library import Library
from quant.ops import compiled, linear

__all__ = ["Batch", "Decoder", "SequenceSlice"]


# For how many tokens at once guesses are made: more than these choose most experts anyway, which is
# no reason not to guess where the copies themselves take long.
GUESS_TOKENS = range(1, 9)


class Lookahead:
    """Guesses which experts the next layer will choose, from the hidden state before this MLP.

    What the MLP and the next attention add turns few choices around: with one guess for one choice
    three of four are right, with two nine of ten.
    """

    def __init__(self, following: "DecoderLayer", guesses: int, tokens: range) -> None:
        assert isinstance(following.mlp, MoeBlock), "a guess about a layer without experts"
        self.block = following.mlp
        self.norm, self.eps = following.post_norm, following.eps
        self.guesses = guesses
        self.tokens = tokens

    def __call__(self, hidden: Tensor) -> None:
        """hidden [T, H]; tells the provider of experts."""
        if hidden.shape[0] not in self.tokens:
            return
        normed = rms_norm(hidden, self.norm, self.eps)
        self.tell(self.block.router.guess(normed, self.guesses))

    def tell(self, topk_ids: Tensor) -> None:
        """The provider, what will probably be chosen, [T, guesses]."""
        self.block.experts.prefetch(self.block.layer, topk_ids)


class DecoderLayer:
    """Attention and MLP of one layer, each added to the residual stream."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        weights: Weights,
        experts: ExpertProvider,
        dtype: torch.dtype,
    ) -> None:
        prefix = f"layers.{layer}."
        self.eps = spec.rms_norm_eps
        self.input_norm = dense(weights, prefix + "input_norm").to(dtype)
        self.post_norm = dense(weights, prefix + "post_norm").to(dtype)
        kind = LatentAttention if spec.layers[layer].attention == "latent" else Attention
        self.attention = kind(spec, layer, weights, dtype)
        self.mlp: Mlp | MoeBlock = (
            MoeBlock(spec, layer, weights, experts, dtype)
            if spec.layers[layer].moe
            else Mlp(prefix + "mlp", weights)
        )
        self.lookahead: Lookahead | None = None

    def __call__(self, hidden: Tensor, delta: Tensor | None, step: Step) -> Tensor:
        """hidden [T, H] and what the layer before adds to it -> what this layer adds.

        `hidden` becomes, in place, what this layer adds to: one operation both adds and normalises.
        """
        if delta is None:
            normed = rms_norm(hidden, self.input_norm, self.eps)
        else:
            normed = add_rms_norm(hidden, delta, self.input_norm, self.eps)
        normed = add_rms_norm(hidden, self.attention(normed, step), self.post_norm, self.eps)
        if self.lookahead is not None and step.looks_ahead:
            self.lookahead(hidden)
        return self.mlp(normed)


class Embedding:
    """Rows of a table that may lie elsewhere than on the device that computes."""

    def __init__(
        self, table: Tensor, address: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.table = table  # [V, H]
        self.device = device
        self.dtype = dtype
        self._address: Tensor | None = None  # [1]
        if address:
            assert table.is_contiguous(), "an embedding with gaps"
            self._address = torch.tensor([address], device=device)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, H], a new tensor."""
        if self._address is not None:
            ids, width = token_ids.to(self.device), self.table.shape[1]
            return gather_rows(self._address, ids, width, self.table.dtype).to(self.dtype)
        rows = F.embedding(token_ids.to(self.table.device), self.table)
        return rows.to(self.device, self.dtype)


class Decoder:
    """A text decoder; weights stay as the loader gives them, arithmetic is in `dtype`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        experts: ExpertProvider,
        dtype: torch.dtype = torch.float32,
        guesses: int = 0,
        guess_tokens: range = GUESS_TOKENS,
        device: torch.device | str = "cpu",
        embedding_address: int = 0,
    ) -> None:
        """`weights(name)` gives each of `spec.dense_tensors`, by the name it has there.

        All of them lie on `device`, the input embedding excepted: it may stay in main memory, and
        where the device can read it there, `embedding_address` says where it sees it. Only then, or
        on the device, can the embedding be part of a captured step.
        `guesses`: how many experts a token are prefetched for each next layer; 0: none.
        `guess_tokens`: for how many tokens at once.
        """
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        table = dense(weights, "embed_tokens")  # [V, H]
        self.embedding = Embedding(table, embedding_address, self.device, dtype)
        self.norm = dense(weights, "norm").to(dtype)
        assert self.norm.device.type == self.device.type, f"weights on {self.norm.device}"
        self.head = table if spec.tie_word_embeddings else weights("lm_head")
        self.make_step = StepMaker(spec, self.device)
        self._compiled: dict[Library, FewTokens | None] = {}  # by whose kernels they call
        self.layers = [
            DecoderLayer(spec, layer, weights, experts, dtype) for layer in range(spec.num_layers)
        ]
        if guesses:
            for layer, following in pairwise(self.layers):
                if isinstance(following.mlp, MoeBlock):
                    count = min(guesses, spec.num_experts)
                    layer.lookahead = Lookahead(following, count, guess_tokens)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits fp32: [S, V] of each sequence's last token, or [T, V] with `all_logits`.

        Extends the caches of the batch; if it raises, their `length` says what is still whole.
        """
        for piece in batch.slices:
            piece.cache.begin(piece.start, piece.length)
        logits = self.run(batch.token_ids, self.make_step(batch), batch.patches)
        for piece in batch.slices:
            piece.cache.commit()
        return logits

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, position: Tensor, cache: KvCache) -> Tensor:
        """Logits fp32 [1, V] after one token, from operations of the device alone.

        Shapes: token_ids and position int64 [1], both on the device. May be captured as a graph,
        and replayed after new numbers are written into these two. Extends the cache only between
        its `begin` and `commit`, which are the caller's.
        """
        return self.run(token_ids, DeviceStep(self.make_step.positions, cache, position))

    @torch.inference_mode()
    def run(self, token_ids: Tensor, step: Step, patches: Patches | None = None) -> Tensor:
        """Logits fp32 [rows, V] of tokens [T]; what they are and where they stand is the step's."""
        hidden = self.embedding(token_ids)  # [T, H]
        if patches is not None:
            hidden.index_copy_(0, patches.rows, patches.embeddings.to(hidden))
        if isinstance(step, BatchStep):
            few = self._few_tokens()
            if few is not None and few.takes(step):
                return few.logits(hidden, step)
        delta = self._all_layers(hidden, step)
        if step.rows is not None:
            hidden, delta = hidden[step.rows], delta[step.rows]
        normed = add_rms_norm(hidden, delta, self.norm, self.spec.rms_norm_eps)
        return linear(normed, self.head).float()

    def _all_layers(self, hidden: Tensor, step: Step) -> Tensor:
        """What the last layer adds to `hidden` [T, H], which becomes what it is added to."""
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer(hidden, delta, step)
        assert delta is not None, "a decoder without layers"
        return delta

    def _few_tokens(self) -> FewTokens | None:
        """The compiled way of this decoder, where there is one and it is wanted."""
        library = compiled()
        if library is None or self.dtype != torch.float32 or self.device.type != "cpu":
            return None
        if library not in self._compiled:
            self._compiled[library] = FewTokens.of(library, self)
        return self._compiled[library]
