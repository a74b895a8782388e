"""Runs moecli's engine when it is told to.

    python -m benchmarks.llama.our_worker

Decodes as `moecli run` does, drawing tokens and turning them into text included.
"""

import itertools
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llama import our_model
from benchmarks.llama.serving import serve
from moecli.bench_result import Run
from moecli.bench_tests import BenchConfig, BenchTests
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.models.moe import MoeBlock
from moecli.models.provider import ExpertProvider, Pending
from offload.hardware import Machine
from quant import ops
from quant.scheme import QuantScheme


class Ours:
    """One open model at a time."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._seeds = itertools.count()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "no model is open"
        return self._engine

    def make(
        self, config: dict[str, Any], path: str, scheme: str, dense_scheme: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        schemes = QuantScheme.parse(scheme), QuantScheme.parse(dense_scheme)
        our_model.make(config, Path(path), *schemes)

    def sizes(self, path: str) -> dict[str, Any]:
        return asdict(our_model.sizes(Path(path)))

    def open(self, path: str, threads: int, ctx: int, kernels: str) -> dict[str, Any]:
        """Where experts are: all of them must have a place in memory."""
        self.close()
        config = EngineConfig(ctx=ctx, threads=threads, kernels=kernels, device="cpu")
        self._engine = Engine.open(Path(path), config)
        plan = self._engine.plan
        if not plan.all_resident:
            raise RuntimeError(f"memory holds {plan.host_slots} of {plan.total_experts} experts")
        self._fill()
        return {
            "threads": torch.get_num_threads(),
            "ram_nbytes": plan.ram_nbytes,
            "kernels": kernels,
            "isa": ops.cpu_isa() if ops.fallback() is None else None,
        }

    def _fill(self) -> None:
        """Bring every expert to its place, by tokens that ask for all of them."""
        spec, provider = self.engine.spec, _experts(self.engine)
        top_k = spec.experts_per_token
        ids = torch.arange(-(-spec.num_experts // top_k) * top_k) % spec.num_experts
        ids = ids.view(-1, top_k)  # [T, k]
        hidden = torch.zeros(len(ids), spec.hidden_size)  # [T, H]
        for layer in spec.moe_layers:
            provider.begin(layer, hidden, ids, torch.ones(ids.shape)).result()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a fresh prompt, its first token drawn."""
        return self._test(prompt_tokens=tokens).prompt()[1].tok_s

    def decode(self, tokens: int) -> float:
        """Tokens a second, one after the other, behind a prompt of one."""
        return self._resident(self._test(new_tokens=tokens).answer()[1])

    def together(self, tokens: int, sequences: int) -> float:
        """Tokens a second of all sequences, each of which gets `tokens`."""
        return self._resident(self._test(new_tokens=tokens).answers(sequences)[1])

    def logits(self, tokens: list[int]) -> list[float]:
        """Those after a prompt."""
        return self.engine.step([self.engine.new_session()], [tokens])[0].tolist()

    def routing(self, tokens: int) -> dict[str, float]:
        """How often a random prompt asks for an expert, in parts of its fair share."""
        spec, counts = self.engine.spec, Counter[tuple[int, int]]()
        provider = _experts(self.engine)
        begin = provider.begin

        def counting(layer: int, hidden: Tensor, topk_ids: Tensor, weights: Tensor) -> Pending:
            counts.update((layer, expert) for expert in topk_ids.flatten().tolist())
            return begin(layer, hidden, topk_ids, weights)

        # Each token's choice counts here; ExpertUsage counts an expert once a step.
        provider.begin = counting  # type: ignore[method-assign]
        try:
            self.prefill(tokens)
        finally:
            provider.begin = begin  # type: ignore[method-assign]
        fair = counts.total() / (len(spec.moe_layers) * spec.num_experts)
        shares = [
            counts[layer, expert] / fair
            for layer in spec.moe_layers
            for expert in range(spec.num_experts)
        ]
        return {"least": min(shares), "median": statistics.median(shares), "most": max(shares)}

    def _test(self, **lengths: int) -> BenchTests:
        config = BenchConfig(**{"prompt_tokens": 1, "new_tokens": 1, **lengths})
        return BenchTests(
            self.engine, config, SamplingConfig(), Machine, lambda: False, next(self._seeds)
        )

    def _resident(self, run: Run) -> float:
        if run.moved_nbytes:
            raise RuntimeError(f"{run.moved_nbytes:.0f} bytes a token came from the disk")
        return run.tok_s


def _experts(engine: Engine) -> ExpertProvider:
    """The one that serves all layers."""
    blocks = [layer.mlp for layer in engine.decoder.layers]
    return next(block.experts for block in blocks if isinstance(block, MoeBlock))


if __name__ == "__main__":
    ours = Ours()
    names = ("make", "sizes", "open", "close", "prefill", "decode", "together", "logits", "routing")
    serve({name: getattr(ours, name) for name in names})
