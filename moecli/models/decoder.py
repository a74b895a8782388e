"""Knows how the layers of a text decoder follow each other; not where its experts lie.

Legend of the shapes: T tokens of all sequences end to end, S sequences, H hidden, V vocabulary.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moecli.models.attention import (
    Attention,
    StepContext,
    StepMaker,
    Weights,
    dense,
    rms_norm,
)
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import ModelSpec
from moecli.models.moe import Mlp, MoeBlock
from moecli.models.provider import ExpertProvider
from quant.ops import linear

__all__ = ["Batch", "Decoder", "SequenceSlice"]


GUESS_TOKENS = 8  # more tokens at once than this choose most experts anyway


class Lookahead:
    """Guesses which experts the next layer will choose, from the hidden state before this MLP.

    What the MLP and the next attention add turns few choices around: with one guess for one choice
    three of four are right, with two nine of ten.
    """

    def __init__(self, following: "DecoderLayer", guesses: int) -> None:
        self.following = following
        self.guesses = guesses

    def __call__(self, hidden: Tensor) -> None:
        """hidden [T, H]; tells the provider of experts."""
        if hidden.shape[0] > GUESS_TOKENS:
            return
        layer, block = self.following, self.following.mlp
        assert isinstance(block, MoeBlock), "a guess about a layer without experts"
        logits = linear(rms_norm(hidden, layer.post_norm, layer.eps), block.router.weight)  # [T, E]
        block.experts.prefetch(block.layer, logits.topk(self.guesses, dim=-1).indices)


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
        self.attention = Attention(spec, layer, weights, dtype)
        self.mlp: Mlp | MoeBlock = (
            MoeBlock(spec, layer, weights, experts)
            if spec.layers[layer].moe
            else Mlp(prefix + "mlp", weights)
        )
        self.lookahead: Lookahead | None = None

    def __call__(self, hidden: Tensor, step: StepContext) -> Tensor:
        """hidden [T, H] -> [T, H]."""
        hidden = hidden + self.attention(rms_norm(hidden, self.input_norm, self.eps), step)
        if self.lookahead is not None:
            self.lookahead(hidden)
        return hidden + self.mlp(rms_norm(hidden, self.post_norm, self.eps))


class Decoder:
    """A text decoder; weights stay as the loader gives them, arithmetic is in `dtype`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        experts: ExpertProvider,
        dtype: torch.dtype = torch.float32,
        guesses: int = 0,
    ) -> None:
        """`weights(name)` gives each of `spec.dense_tensors`, by the name it has there.

        `guesses`: how many experts a token are prefetched for each next layer; 0: none.
        """
        self.spec = spec
        self.dtype = dtype
        self.embedding = dense(weights, "embed_tokens")  # [V, H]
        self.norm = dense(weights, "norm").to(dtype)
        self.head = self.embedding if spec.tie_word_embeddings else weights("lm_head")
        self.make_step = StepMaker(spec)
        self.layers = [
            DecoderLayer(spec, layer, weights, experts, dtype) for layer in range(spec.num_layers)
        ]
        if guesses:
            for layer, following in pairwise(self.layers):
                if isinstance(following.mlp, MoeBlock):
                    layer.lookahead = Lookahead(following, min(guesses, spec.num_experts))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits fp32: [S, V] of each sequence's last token, or [T, V] with `all_logits`.

        Extends the caches of the batch; if it raises, their `length` says what is still whole.
        """
        for piece in batch.slices:
            piece.cache.begin(piece.start, piece.length)
        step = self.make_step(batch)
        hidden = F.embedding(batch.token_ids, self.embedding).to(self.dtype)  # [T, H]
        for layer in self.layers:
            hidden = layer(hidden, step)
        if not batch.all_logits and len(batch.slices) != hidden.shape[0]:
            hidden = hidden[batch.last_rows()]
        logits = linear(rms_norm(hidden, self.norm, self.spec.rms_norm_eps), self.head).float()
        for piece in batch.slices:
            piece.cache.commit()
        return logits
