"""Knows shards of encoded documents and how flat batches are cut from them; knows no model."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_data.mix import SHARES, draw
from demo_model import Batch
from demo_tokenizer import BOS, END, EOT, HEADER_END, HEADER_START, PAD, Tokenizer, render

DOMAINS = list(SHARES)
PROMPT_WEIGHT = 0.2  # what a user types is predicted too, but counts less
MULTIPLE = 16  # documents are padded to a multiple, so that attention has few sizes


@dataclass(frozen=True)
class Encoded:
    domain: int
    tokens: np.ndarray  # int16 [L]
    weights: np.ndarray  # float16 [L], of predicting this very token


class Encoder:
    """Documents to tokens and weights."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids = {
            s: tokenizer.token_to_id(s) for s in (BOS, END, EOT, HEADER_END, HEADER_START, PAD)
        }
        self.assistant = tokenizer.encode("assistant", add_special_tokens=False).ids[0]

    def size(self, document) -> int:
        text = render(document.as_dict())
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, documents: list) -> list[Encoded]:
        rows = [d.as_dict() for d in documents]
        batch = self.tokenizer.encode_batch([render(r) for r in rows], add_special_tokens=False)
        return [
            Encoded(
                DOMAINS.index(r["domain"]),
                np.array(e.ids, np.int16),
                self.weights(e.ids, "text" in r),
            )
            for r, e in zip(rows, batch, strict=True)
        ]

    def weights(self, ids: list[int], plain: bool) -> np.ndarray:
        weights = np.full(len(ids), 1.0 if plain else PROMPT_WEIGHT, np.float16)
        if plain:
            return weights
        inside, header = False, False
        for i, token in enumerate(ids):
            if token == self.ids[HEADER_START]:
                inside, header = ids[i + 1] == self.assistant, True
            elif header:
                header = token != self.ids[HEADER_END]
            elif inside:
                weights[i] = 1.0
        return weights


def write_shard(
    path: Path,
    encoder: Encoder,
    sources: Path,
    seed: str,
    num_tokens: int,
    long: bool,
    copying: float = 0.0,
) -> None:
    rng = random.Random(seed)
    items = encoder.encode(draw(rng, sources, encoder.size, num_tokens, long, copying))
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([e.tokens for e in items]),
            weights=np.concatenate([e.weights for e in items]),
            lengths=np.array([len(e.tokens) for e in items], np.int32),
            domains=np.array([e.domain for e in items], np.int8),
        )
    os.replace(part, path)


def read_shard(path: Path) -> list[Encoded]:
    with np.load(path) as data:
        cuts = np.cumsum(data["lengths"])[:-1]
        tokens, weights = np.split(data["tokens"], cuts), np.split(data["weights"], cuts)
        return [
            Encoded(int(d), t, w) for d, t, w in zip(data["domains"], tokens, weights, strict=True)
        ]


@dataclass(frozen=True)
class Cut:
    """A batch and the domain of each of its documents."""

    batch: Batch
    domains: list[int]


def cut_batch(
    documents: Iterator[Encoded], size: int, max_length: int, pad: int, chunk: int
) -> Cut:
    """Fill size tokens with whole documents; the last one is cut short."""
    columns: list[tuple] = []
    lengths, domains, left = [], [], size
    while left:
        item = next(documents)
        limit = min(max_length, left)
        inputs, targets = item.tokens[:-1][:limit], item.tokens[1:][:limit]
        weights = item.weights[1:][:limit].astype(np.float32)
        length = min(-(-len(inputs) // MULTIPLE) * MULTIPLE, left)
        extra = length - len(inputs)
        columns.append(
            (
                np.pad(inputs, (0, extra), constant_values=pad),
                np.pad(targets, (0, extra)),
                np.pad(weights, (0, extra)),
                np.arange(length),
                (np.arange(length) < len(inputs)).astype(np.float32),
            )
        )
        lengths.append(length)
        domains.append(item.domain)
        left -= length
    tokens, targets, weights, positions, real = (
        torch.from_numpy(np.concatenate(c)) for c in zip(*columns, strict=True)
    )
    chunks = [min(chunk, n - start) for n in lengths for start in range(0, n, chunk)]
    batch = Batch(
        tokens.long(), targets.long(), weights.float(), positions.long(), lengths, chunks, real
    )
    return Cut(batch, domains)
