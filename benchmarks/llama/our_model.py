"""Knows how a model of random weights becomes one of moecli's, by moecli's own converter.

The source is computed as it is read: nothing but the result lies on the disk.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from benchmarks.llama.naming import Named, tensors
from benchmarks.llama.numbers import Numbers
from moecli.models.config import ModelSpec
from moecli.models.naming import plan_conversion
from quant.checkpoint import QuantizedCheckpoint, TensorInfo
from quant.convert import convert
from quant.job import ConversionJob
from quant.pack_quantized import quantization_config
from quant.scheme import QuantScheme

_BF16_NBYTES = 2
_TOKENIZER = "tokenizer.json"


class RandomCheckpoint:
    """Stands where a Checkpoint stands, with weights of benchmarks.llama.numbers."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self._numbers = Numbers()
        self._named = {tensor.hf: tensor for tensor in tensors(config)}
        self._held: tuple[str, Tensor] | None = None
        self.tensors = {name: self._info(tensor) for name, tensor in self._named.items()}

    def _info(self, tensor: Named) -> TensorInfo:
        nbytes = _BF16_NBYTES * math.prod(tensor.shape)
        return TensorInfo(self.path, torch.bfloat16, tensor.shape, 0, nbytes)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    form = ""

    def files_of(self, name: str) -> frozenset[str]:
        return frozenset((self.path.name,))

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        held = self._held  # threads read: what this one finds or makes is what it returns
        if held is None or held[0] != name:
            bits = self._numbers.bf16(self._named[name])
            held = self._held = name, torch.from_numpy(bits.view("int16")).view(torch.bfloat16)
        return held[1]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]


def make(config: dict[str, Any], out: Path, scheme: QuantScheme, dense_scheme: QuantScheme) -> None:
    """Quantize experts to `scheme` and attention, shared experts and head to `dense_scheme`."""
    with TemporaryDirectory() as folder:
        _write_tokenizer(Path(folder) / _TOKENIZER, config["vocab_size"])
        source = RandomCheckpoint(Path(folder), config)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        conversion = plan_conversion(ModelSpec.from_hf(config), shapes, dense_scheme)
        said = quantization_config(scheme, dense_scheme, conversion.ignore)
        # A checkpoint whose tensors are drawn when they are read: all that `convert` asks of one.
        job = ConversionJob(
            source=source,  # type: ignore[arg-type]
            out=out,
            scheme=scheme,
            dense_scheme=dense_scheme,
            experts=conversion.experts,
            dense=conversion.dense,
            config={**config, "quantization_config": said},
            extra_files=(_TOKENIZER,),
        )
        convert(job)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """A word for every token, so that turning tokens into text costs what it costs."""
    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))


@dataclass(frozen=True)
class ModelSizes:
    """Without the input embedding, of which a token reads one row; as `gguf_model.sizes`."""

    nbytes: int
    read_nbytes: float  # a token
    bits_a_weight: float


def sizes(path: Path) -> ModelSizes:
    checkpoint = QuantizedCheckpoint.open(path)
    spec = ModelSpec.from_hf(dict(checkpoint.config))
    unread = ("weight_shape", "inv_freq", "embed_tokens.weight")
    stored = {
        name: info.nbytes
        for name, info in checkpoint.checkpoint.tensors.items()
        if not name.endswith(unread)
    }
    total = sum(stored.values())
    experts = sum(nbytes for name, nbytes in stored.items() if ".experts." in name)
    idle = experts * (1 - spec.experts_per_token / spec.num_experts)
    weights = spec.num_text_params - spec.vocab_size * spec.hidden_size
    return ModelSizes(total, total - idle, 8 * total / weights)
