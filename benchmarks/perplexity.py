"""Perplexity of a checkpoint on held-out text: as stored, and quantized in every way moecli offers.

    python benchmarks/perplexity.py [MODEL_DIR] [--heldout DIR] [--json FILE]

Weights are quantized and dequantized in memory and the model runs in float32, so that the rounding
of weights alone is measured. Prints a Markdown table; `--json` writes the same figures.

The standard error of a difference is over documents, paired: the same text under both weights.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.moe import FloatExpert, FloatExperts
from moecli.models.naming import plan_conversion
from moecli.tokenizer import Tokenizer
from quant.checkpoint import Checkpoint
from quant.items import SliceReader, TensorSlice
from quant.quantize import Method, dequantize, quantize
from quant.scheme import QuantScheme

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Variant:
    """One way to store the weights; None: 16 bits, as in the checkpoint."""

    experts: QuantScheme | None
    dense: QuantScheme | None
    method: Method = "searched"

    @property
    def name(self) -> str:
        names = [scheme.name if scheme else "bf16" for scheme in (self.experts, self.dense)]
        return f"{names[0]} experts, {names[1]} dense"


@dataclass(frozen=True)
class Row:
    """Perplexity over all tokens, and the relative change against 16 bits with standard error."""

    experts: str
    dense: str
    method: str
    bpw_experts: float
    perplexity: float
    change: float
    change_stderr: float


def variants() -> list[Variant]:
    dense = QuantScheme(8, 128)
    found = [Variant(None, None), Variant(None, dense)]
    for bits in (8, 4):
        for group_size in (32, 64, 128):
            for method in ("nearest", "searched"):
                found.append(Variant(QuantScheme(bits, group_size), None, method))
    return [*found, Variant(QuantScheme(4, 32), dense)]


def rounded(weight: Tensor, scheme: QuantScheme | None, method: Method) -> Tensor:
    if scheme is None:
        return weight.float()
    return dequantize(quantize(weight, scheme, method))


class Subject:
    """A 16-bit checkpoint that can be run with any rounding of its weights."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.spec = ModelSpec.from_hf(dict(self.checkpoint.config))
        self.tokenizer = Tokenizer.open(path)
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        self._conversion = plan_conversion(self.spec, shapes, QuantScheme(8, 128))
        self._shapes = shapes
        self._reader = SliceReader(self.checkpoint)

    def decoder(self, variant: Variant) -> Decoder:
        experts: dict[tuple[int, int], FloatExpert] = {}
        for item in self._conversion.experts:
            gate, up, down = (
                rounded(self._read(part), variant.experts, variant.method)
                for part in item.projections.values()
            )
            experts[item.layer, item.expert] = gate, up, down
        provider = FloatExperts(self.spec, lambda layer, expert: experts[layer, expert])
        return Decoder(self.spec, self._dense(variant), provider)

    def _read(self, part: TensorSlice) -> Tensor:
        return torch.cat([block.clone() for block in self._reader.blocks(part)])

    def _dense(self, variant: Variant) -> Callable[[str], Tensor]:
        from moecli.models.naming import dense_loader

        linear = {item.name for item in self._conversion.dense if item.scheme is not None}

        def read(name: str) -> Tensor:
            tensor = self.checkpoint.read(name)
            if name.removesuffix(".weight") in linear:
                return rounded(tensor, variant.dense, variant.method)
            return tensor.float()

        return dense_loader(self.spec, self._shapes, read)

    def token_ids(self, document: dict) -> list[int]:
        if "messages" in document:
            text = self.tokenizer.render(document["messages"], add_generation_prompt=False)
            return self.tokenizer.encode(text)
        return self.tokenizer.encode(document["text"], special=True)


def losses(subject: Subject, decoder: Decoder, documents: list[list[int]]) -> Tensor:
    """Summed negative log-likelihood of each document, fp64 [documents]."""
    sums = []
    for ids in documents:
        tokens = torch.tensor(ids)
        cache = KvCache(subject.spec, len(ids), torch.float32)
        logits = decoder.forward(Batch.of(tokens, cache, all_logits=True))  # [T, V]
        log_probs = logits[:-1].double().log_softmax(-1)
        sums.append(-log_probs.gather(1, tokens[1:, None]).sum())
    return torch.stack(sums)


def compare(variant: Variant, found: Tensor, base: Tensor, counts: Tensor) -> Row:
    total = counts.sum()
    loss, base_loss = (x.sum() / total for x in (found, base))
    difference = found - base  # [documents]
    spread = (difference - counts * difference.sum() / total).pow(2).sum().sqrt() / total
    scheme = variant.experts
    change = math.expm1(float(loss - base_loss))
    return Row(
        experts=scheme.name if scheme else "bf16",
        dense=variant.dense.name if variant.dense else "bf16",
        method=variant.method if scheme or variant.dense else "",
        bpw_experts=scheme.bpw if scheme else 16.0,
        perplexity=math.exp(float(loss)),
        change=change,
        change_stderr=float(spread) * (1 + change),
    )


def measure(path: Path, heldout: Path, max_tokens: int) -> list[Row]:
    subject = Subject(path)
    documents = [
        subject.token_ids(json.loads(line))[:max_tokens]
        for file in sorted(heldout.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    documents = [ids for ids in documents if len(ids) > 1]
    counts = torch.tensor([len(ids) - 1 for ids in documents], dtype=torch.float64)
    base: Tensor | None = None
    rows = []
    for variant in variants():
        found = losses(subject, subject.decoder(variant), documents)
        base = found if base is None else base
        rows.append(compare(variant, found, base, counts))
        print(markdown(rows[-1:]), flush=True)
    return rows


def markdown(rows: list[Row]) -> str:
    return "\n".join(
        f"| {row.experts} | {row.dense} | {row.method} | {row.bpw_experts:.3g} "
        f"| {row.perplexity:.4f} | {row.change:+.3%} ± {row.change_stderr:.3%} |"
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "moecli" / "demo")
    parser.add_argument("--heldout", type=Path, default=ROOT / "tests" / "fixtures" / "heldout")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a document")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    print("| experts | dense linears | scales | bits a weight | perplexity | against bf16 |")
    print("|---|---|---|---|---|---|")
    rows = measure(options.model, options.heldout, options.max_tokens)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
