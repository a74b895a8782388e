"""How much of a decode step on the processor is not the reading of weights.

    python benchmarks/step_overhead.py [--threads N] [--position P] [--kv-dtype D]
        [--json FILE]

A model of random weights with the shapes of Qwen3-30B-A3B's layers, all experts resident, experts
INT4 in groups of 32 and the rest INT8 in groups of 128. In each round a step is timed; the same
step with products that do nothing, so that only the KV cache is read; such a step in which every
layer asks for its experts, as it must where these come and go; such a step through plain PyTorch;
and how fast memory is read by as many threads. Two answers, for the median step and for the fastest
tenth of them, which is what a busy machine lets through:

- `rest_share`: what is left of a step when its bytes are divided by the memory's bandwidth.
- `overhead_share`: a step whose products do nothing, as a part of a whole one.

Times are in microseconds. `--json` adds to what the file holds of other threads and caches.
"""

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecli.config import SamplingConfig
from moecli.experts import OffloadedExperts
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch
from moecli.models.config import DenseTensor, ModelSpec
from moecli.models.decoder import Decoder
from moecli.sampler import new_generator, sample
from offload.bandwidth import RamBlock
from offload.disk import DiskTier, ExpertSpan
from offload.host import HostArena
from offload.manager import ExpertManager
from offload.usage import ExpertUsage
from quant import ops
from quant.kernels.cpu.library import library
from quant.layout import ExpertLayout, ExpertWeights
from quant.scheme import QuantScheme
from quant.tensor import QuantizedWeight

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
KV_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
EXPERTS, DENSE = QuantScheme(4, 32), QuantScheme(8, 128)
READ_NBYTES = 1 << 30  # several times what caches hold
BLOBS = 8  # experts of the file; all others are copies
VOCABULARY = 151936  # of the released model, for what drawing a token costs
# Where the table of kernels (src/types.h) has its products: pointers from its beginning.
ROWS_MATMUL, FLOAT_MATMUL, TABLE = 4, 16, 22


@dataclass(frozen=True)
class Step:
    """Steps of one token at one quantile of speed, each number by itself."""

    step_us: float
    bandwidth_gb_s: float
    rest_share: float
    overhead_us: float  # with products that do nothing; of which:
    overhead_compiled_us: float  # in the compiled call; the rest is Python's
    overhead_share: float
    asking_overhead_us: float  # as overhead_us, where every layer asks for its experts
    plain_overhead_us: float  # as overhead_us, through plain PyTorch


@dataclass(frozen=True)
class Report:
    isa: str
    threads: int
    layers: int
    position: int
    kv_dtype: str
    rounds: int
    step_nbytes: int  # of weights, a step reads
    median: Step
    fast: Step  # the fastest tenth
    draw_greedy_us: float  # drawing from VOCABULARY logits, least
    draw_all_us: float  # with temperature 0.7 alone
    draw_top_us: float  # with top-k 20 and top-p 0.95 too


class Model:
    """A decoder of random weights over a manager that holds all experts."""

    def __init__(self, layers: int, ctx: int, kv_dtype: torch.dtype, folder: Path) -> None:
        self.spec = ModelSpec.from_hf({**QWEN3_30B, "num_hidden_layers": layers})
        spec = self.spec
        self.layout = ExpertLayout(spec.hidden_size, spec.expert_intermediate_size, EXPERTS)
        file = folder / "experts"
        size = self.layout.slot_nbytes
        with file.open("wb") as out:
            for seed in range(BLOBS):
                out.write(self._blob(seed).numpy().tobytes().ljust(size, b"\0"))
        spans = {
            (layer, expert): ExpertSpan(file, expert % BLOBS * size, self.layout.nbytes)
            for layer in spec.moe_layers
            for expert in range(spec.num_experts)
        }
        self.manager = ExpertManager(DiskTier(spans), HostArena(len(spans) * size, size))
        self.manager.load_all()
        dense = {tensor.name: self._dense(tensor) for tensor in spec.dense_tensors}
        usage = ExpertUsage(spec.moe_layers, spec.num_experts)
        provider = OffloadedExperts(self.manager, self.layout, spec, usage)
        self.provider = provider
        self.decoder = Decoder(spec, dense.__getitem__, provider)
        self.cache = KvCache(spec, ctx, kv_dtype)

    def _blob(self, seed: int) -> Tensor:
        shapes = self.layout.projections.values()
        weights = [_quantized(*shape, EXPERTS, 3 * seed + i) for i, shape in enumerate(shapes)]
        blob = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        self.layout.write(ExpertWeights(*weights), blob)
        return blob

    def _dense(self, tensor: DenseTensor) -> Tensor | QuantizedWeight:
        if tensor.linear:
            return _quantized(*tensor.shape, DENSE, len(tensor.name))
        if len(tensor.shape) == 1:
            return torch.ones(tensor.shape, dtype=torch.bfloat16)
        return (torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5).bfloat16()

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that a step reads, one row of the embedding left out."""
        total = len(self.spec.moe_layers) * self.spec.experts_per_token * self.layout.nbytes
        for tensor in self.spec.dense_tensors:
            scales = tensor.numel // DENSE.group_size * 2
            if tensor.name != "embed_tokens":
                total += tensor.numel + scales if tensor.linear else 2 * tensor.numel
        return total


def _quantized(rows: int, columns: int, scheme: QuantScheme, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    packed_shape = scheme.packed_shape(rows, columns)
    packed = torch.randint(-(2**31), 2**31, packed_shape, generator=generator).int()
    scale = torch.rand(scheme.scale_shape(rows, columns), generator=generator) + 0.5
    return QuantizedWeight(packed, (scale * columns**-0.5 / scheme.zero_point).bfloat16(), scheme)


@contextmanager
def no_products() -> Iterator[None]:
    """The compiled kernels, with products that do nothing: results are what memory held before.

    Much of that is denormal, on which a processor would spend its time: it is taken for zero.
    """
    kernels, idle = library(), ctypes.CDLL(None).abs  # returns at once, whatever it is called with
    before = kernels._kernels
    table = (ctypes.c_void_p * TABLE).from_buffer_copy(ctypes.string_at(before.value, 8 * TABLE))
    table[ROWS_MATMUL] = table[FLOAT_MATMUL] = ctypes.cast(idle, ctypes.c_void_p)
    kernels._kernels = ctypes.c_void_p(ctypes.addressof(table))
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        kernels._kernels = before


def us(task: Callable[[], object], repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        task()
    return (time.perf_counter() - begin) / repeats * 1e6


class Compiled:
    """Adds up what the compiled call of a model's steps takes."""

    def __init__(self, model: Model) -> None:
        self._spent = 0.0
        few = model.decoder._few_tokens()
        assert few is not None, "the compiled kernels do not compute here"
        step = few._library.step

        def timed(*arguments: Any) -> int:
            begin = time.perf_counter()
            layer = step(*arguments)
            self._spent += (time.perf_counter() - begin) * 1e6
            return layer

        # The engine knows nothing of clocks: what is timed is put in its place from here.
        few._library.step = timed  # type: ignore[method-assign]

    def take(self) -> float:
        spent, self._spent = self._spent, 0.0
        return spent


@contextmanager
def asking(model: Model) -> Iterator[None]:
    """Experts that may go, as far as the decoder knows."""
    model.provider.resident = lambda layer: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.provider.resident


@contextmanager
def plain(model: Model) -> Iterator[None]:
    """Steps as plain PyTorch has them."""
    model.decoder._few_tokens = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.decoder._few_tokens


def draw_us(sampling: SamplingConfig) -> float:
    logits, generator = torch.randn(VOCABULARY) * 3, new_generator(0)
    return min(us(lambda: sample(logits, sampling, generator)) for _ in range(30))


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


class Times:
    """What was measured, round by round."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.idle: list[float] = []
        self.compiled: list[float] = []
        self.asking: list[float] = []
        self.plain: list[float] = []
        self.bandwidths: list[float] = []  # GB/s

    def at(self, part: float, nbytes: int) -> Step:
        step_us, overhead = quantile(self.whole, part), quantile(self.idle, part)
        bandwidth = quantile(self.bandwidths, 1 - part)
        return Step(
            step_us=step_us,
            bandwidth_gb_s=bandwidth,
            rest_share=1 - nbytes / (bandwidth * 1e3) / step_us,
            overhead_us=overhead,
            overhead_compiled_us=quantile(self.compiled, part),
            overhead_share=overhead / step_us,
            asking_overhead_us=quantile(self.asking, part),
            plain_overhead_us=quantile(self.plain, part),
        )


def measure(layers: int, position: int, threads: int, rounds: int, kv_dtype: str) -> Report:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(layers, position + 2, KV_DTYPES[kv_dtype], Path(folder))
    vocabulary = model.spec.vocab_size
    prompt = torch.randint(0, vocabulary, (position,))
    model.decoder.forward(Batch.of(prompt, model.cache))
    compiled, times = Compiled(model), Times()
    block = RamBlock(threads, READ_NBYTES)

    def step() -> None:
        token = torch.randint(0, vocabulary, (1,))
        model.decoder.forward(Batch.of(token, model.cache))
        model.cache.truncate(position)

    for _ in range(rounds):
        step()
        times.whole.append(us(step))
        with no_products():
            for _ in range(3):
                step()  # after PyTorch's, whose threads go on waiting for work for a while
                compiled.take()
                times.idle.append(us(step))
                times.compiled.append(compiled.take())
                with asking(model):
                    times.asking.append(us(step))
                with plain(model):
                    times.plain.append(us(step))
        times.bandwidths += [block.read() / 1e9 for _ in range(3)]
    block.close()
    model.manager.close()
    return Report(
        isa=ops.cpu_isa(),
        threads=threads,
        layers=layers,
        position=position,
        kv_dtype=kv_dtype,
        rounds=rounds,
        step_nbytes=model.step_nbytes,
        median=times.at(0.5, model.step_nbytes),
        fast=times.at(0.1, model.step_nbytes),
        draw_greedy_us=draw_us(SamplingConfig(temperature=0)),
        draw_all_us=draw_us(SamplingConfig(temperature=0.7)),
        draw_top_us=draw_us(SamplingConfig(temperature=0.7, top_k=20, top_p=0.95)),
    )


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--position", type=int, default=200)
    parser.add_argument("--kv-dtype", choices=list(KV_DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(
        options.layers, options.position, options.threads, options.rounds, options.kv_dtype
    )
    found = rounded(asdict(report))
    print(json.dumps(found, indent=1))
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        kept[f"{report.threads} threads, {report.kv_dtype}, position {report.position}"] = found
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
