"""How fast the kernels for the processor are, beside how fast memory can be read in the same run.

python benchmarks/cpu_kernels.py --json benchmarks/results/cpu_kernels.json

Decode: GB/s of expert bytes by tokens an expert. Prefill: GFLOP/s, every expert chosen equally
often. Experts take turns over more memory than caches hold. Figures are medians; the clock is the
wall's, or with `--cpu-time`, on one thread, that of the thread: what a busy machine takes away from
it then does not count.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels.cpu.backend import CpuBackend
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme

SHAPES = {"qwen3-30b-a3b": (2048, 768, 128, 8), "llama4-scout": (5120, 8192, 16, 1)}
SPREAD_NBYTES = 512 << 20  # of the experts that take turns
DECODE_TOKENS = (1, 2, 4, 6, 8)
PREFILL_TOKENS = (32, 128, 512)


class Layer:
    """Made-up experts of one shape, and calls that walk through them."""

    def __init__(self, name: str, scheme: QuantScheme) -> None:
        hidden, intermediate, experts, self.top_k = SHAPES[name]
        self.layout = ExpertLayout(hidden, intermediate, scheme)
        count = max(self.top_k, min(experts, SPREAD_NBYTES // self.layout.nbytes))
        self.blobs = [self._blob() for _ in range(count)]
        self.addresses = torch.tensor([blob.data_ptr() for blob in self.blobs])
        self.next = 0

    def _blob(self) -> Tensor:
        blob = torch.randint(0, 256, (self.layout.nbytes,), dtype=torch.uint8)
        weights = self.layout.views(blob)
        for weight in (weights.gate, weights.up, weights.down):
            weight.scale.fill_(0.01)
        return blob

    def call(self, backend: CpuBackend, ids: Tensor) -> Callable[[], None]:
        """The layer for choices `ids` [T, k], which move on by as many experts at each call."""
        num_tokens, hidden = ids.shape[0], torch.randn(ids.shape[0], self.layout.hidden_size)
        weights, span = torch.ones(ids.shape), (0, self.layout.intermediate_size)
        out = torch.zeros(num_tokens, self.layout.hidden_size)

        def run() -> None:
            self.next += self.top_k
            chosen = (ids + self.next) % len(self.blobs)
            backend.add_routed_experts(
                *(out, hidden, chosen, weights, self.addresses, self.layout),
                activation="silu", weight_on_input=False, span=span,
            )  # fmt: skip

        return run

    def decode(self, backend: CpuBackend, num_tokens: int) -> Callable[[], None]:
        """All tokens choose the same experts: `num_tokens` an expert."""
        return self.call(backend, torch.arange(self.top_k).repeat(num_tokens, 1))

    def prefill(self, backend: CpuBackend, num_tokens: int) -> Callable[[], None]:
        return self.call(backend, torch.arange(num_tokens * self.top_k).view(num_tokens, -1))


def seconds(run: Callable[[], object], clock: Callable[[], float], least: float = 0.4) -> float:
    """Median of calls that take `least` seconds together, five at least."""
    run()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < least:
        start = clock()
        run()
        taken.append(clock() - start)
    return statistics.median(taken)


def measure(backend: CpuBackend, name: str, scheme: QuantScheme, clock: Any) -> dict[str, Any]:
    layer = Layer(name, scheme)
    memory = torch.ones(SPREAD_NBYTES // 8, dtype=torch.int64)
    ceiling = memory.nbytes / seconds(memory.sum, clock)
    step_nbytes = layer.top_k * layer.layout.nbytes
    decode = {
        n: step_nbytes / seconds(layer.decode(backend, n), clock) / 1e9 for n in DECODE_TOKENS
    }
    flops = 2 * layer.layout.num_weights * layer.top_k
    prefill = {
        n: n * flops / seconds(layer.prefill(backend, n), clock) / 1e9 for n in PREFILL_TOKENS
    }
    return {
        "shape": name,
        "scheme": scheme.name,
        "read_gb_s": round(ceiling / 1e9, 1),
        "decode_gb_s_by_tokens_an_expert": {n: round(x, 1) for n, x in decode.items()},
        "decode_share_of_read": round(decode[1] * 1e9 / ceiling, 2),
        "prefill_gflop_s_by_tokens": {n: round(x) for n, x in prefill.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="the thread's own time; 1 thread")
    parser.add_argument("--schemes", default="int4,int4-g128,int8-g32,int8")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    backend = CpuBackend()
    result = {
        "isa": backend.isa,
        "threads": options.threads,
        "clock": "thread" if options.cpu_time else "wall",
        "layers": [
            measure(backend, name, QuantScheme.parse(scheme), clock)
            for name in SHAPES
            for scheme in options.schemes.split(",")
        ],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
