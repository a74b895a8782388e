"""How much of a decode step on the processor is not the reading of weights.

    python benchmarks/step_overhead.py [--threads N] [--position P] [--json FILE]

A model of random weights with the shapes of Qwen3-30B-A3B's layers, all experts resident, experts
INT4 in groups of 32 and the rest INT8 in groups of 128. In each round a step is timed, then the
same step with products that do nothing, then how fast memory is read by as many threads. Two
answers:

- `rest_share`: what is left of a step when its bytes are divided by the memory's bandwidth. Memory
  is shared with all that runs on the machine, so this one needs a quiet one.
- `without_products_us`: a layer when nothing is multiplied, so nothing but the KV cache is read.

Times are medians and the least of all rounds, in microseconds a layer unless they say otherwise.
"""

import argparse
import ctypes
import json
import statistics
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
from offload.bandwidth import measure_ram
from offload.disk import DiskTier, ExpertSpan
from offload.host import HostArena
from offload.manager import ExpertManager
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
EXPERTS, DENSE = QuantScheme(4, 32), QuantScheme(8, 128)
BLOBS = 8  # experts of the file; all others are copies
VOCABULARY = 151936  # of the released model, for what drawing a token costs
# Where the table of kernels (src/types.h) has its products: pointers from its beginning.
ROWS_MATMUL, FLOAT_MATMUL, TABLE = 4, 16, 21


@dataclass(frozen=True)
class Report:
    isa: str
    threads: int
    layers: int
    position: int
    rounds: int
    read_nbytes: int  # of weights, a step
    step_us: float  # a whole step, median
    step_least_us: float
    bandwidth_gb_s: float  # median
    bandwidth_best_gb_s: float
    rest_share: float  # of the median step, at the median bandwidth
    rest_share_best: float  # of the least step, at the best bandwidth
    without_products_us: float
    without_products_least_us: float
    share_of_step: float  # medians
    share_of_step_least: float  # least of both
    providers_us: float  # of which: Python and bookkeeping of routed experts
    draw_greedy_us: float  # a token of VOCABULARY logits
    draw_top_us: float  # with top-k 20, top-p 0.95, temperature 0.7


class Model:
    """A decoder of random weights over a manager that holds all experts."""

    def __init__(self, layers: int, ctx: int, folder: Path) -> None:
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
        provider = OffloadedExperts(self.manager, self.layout, spec)
        self.provider = provider
        self.decoder = Decoder(spec, dense.__getitem__, provider)
        self.cache = KvCache(spec, ctx)

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
    def read_nbytes(self) -> int:
        """Bytes of weights that a step reads."""
        spec, total = self.spec, 0
        for tensor in spec.dense_tensors:
            if tensor.linear:
                total += tensor.numel + tensor.numel // DENSE.group_size * 2
            elif tensor.name != "embed_tokens":
                total += 2 * tensor.numel
        return total + len(spec.moe_layers) * spec.experts_per_token * self.layout.nbytes


def _quantized(rows: int, columns: int, scheme: QuantScheme, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    packed_shape = scheme.packed_shape(rows, columns)
    packed = torch.randint(-(2**31), 2**31, packed_shape, generator=generator).int()
    scale = torch.rand(scheme.scale_shape(rows, columns), generator=generator) + 0.5
    return QuantizedWeight(packed, (scale * columns**-0.5 / scheme.zero_point).bfloat16(), scheme)


@contextmanager
def no_products() -> Iterator[None]:
    """The compiled kernels, with products that do nothing: results are what memory held before."""
    kernels, idle = library(), ctypes.CDLL(None).abs  # returns at once, whatever it is called with
    before = kernels._kernels
    table = (ctypes.c_void_p * TABLE).from_buffer_copy(ctypes.string_at(before.value, 8 * TABLE))
    table[ROWS_MATMUL] = table[FLOAT_MATMUL] = ctypes.cast(idle, ctypes.c_void_p)
    kernels._kernels = ctypes.c_void_p(ctypes.addressof(table))
    try:
        yield
    finally:
        kernels._kernels = before


def us(task: Callable[[], object], repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        task()
    return (time.perf_counter() - begin) / repeats * 1e6


def providers_us(model: Model) -> float:
    """What `begin` of the experts costs when their products do nothing."""
    spec = model.spec
    hidden = torch.randn(1, spec.hidden_size)
    ids = torch.arange(spec.experts_per_token)[None]
    weights = torch.full(ids.shape, 1 / spec.experts_per_token)
    with no_products(), torch.inference_mode():
        begin = model.provider.begin
        return min(us(lambda: begin(0, hidden, ids, weights).result(), 20) for _ in range(20))


def draw_us(sampling: SamplingConfig) -> float:
    logits, generator = torch.randn(VOCABULARY) * 3, new_generator(0)
    return min(us(lambda: sample(logits, sampling, generator)) for _ in range(30))


def measure(layers: int, position: int, threads: int, rounds: int) -> Report:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(layers, position + 2, Path(folder))
    tokens = torch.randint(0, model.spec.vocab_size, (position,))
    model.decoder.forward(Batch.of(tokens, model.cache))

    def step() -> None:
        token = torch.randint(0, model.spec.vocab_size, (1,))
        model.decoder.forward(Batch.of(token, model.cache))
        model.cache.truncate(position)

    steps, without, bandwidths = [], [], []
    for _ in range(rounds):
        steps.append(us(step))
        with no_products():
            without.append(min(us(step) for _ in range(2)))
        bandwidths.append((measure_ram(threads, 64 << 20) or 0.0) / 1e9)
    read, median = model.read_nbytes, statistics.median
    rest = [
        1 - read / (band * 1e3) / time_us
        for band, time_us in ((median(bandwidths), median(steps)), (max(bandwidths), min(steps)))
    ]
    report = Report(
        isa=ops.cpu_isa(),
        threads=threads,
        layers=layers,
        position=position,
        rounds=rounds,
        read_nbytes=read,
        step_us=median(steps),
        step_least_us=min(steps),
        bandwidth_gb_s=median(bandwidths),
        bandwidth_best_gb_s=max(bandwidths),
        rest_share=rest[0],
        rest_share_best=rest[1],
        without_products_us=median(without) / layers,
        without_products_least_us=min(without) / layers,
        share_of_step=median(without) / median(steps),
        share_of_step_least=min(without) / min(steps),
        providers_us=providers_us(model),
        draw_greedy_us=draw_us(SamplingConfig(temperature=0)),
        draw_top_us=draw_us(SamplingConfig(temperature=0.7, top_k=20, top_p=0.95)),
    )
    model.manager.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--position", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options.layers, options.position, options.threads, options.rounds)
    found: dict[str, Any] = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in asdict(report).items()
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
