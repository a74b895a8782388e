"""Compiled steps over experts that stay where they are: nobody is asked, and nothing differs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecli.experts import OffloadedExperts
from moecli.kv_cache import KvCache
from moecli.models.batch import Batch, SequenceSlice
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.provider import Pending, Resident
from offload.disk import DiskTier, ExpertSpan
from offload.host import HostArena
from offload.manager import ExpertManager
from offload.trace import Trace
from offload.usage import ExpertUsage
from quant import ops
from quant.layout import ExpertLayout, ExpertWeights
from quant.scheme import QuantScheme
from tests.models.few_specs import CHUNKED, SPEC
from tests.models.test_models_few_tokens import random_weights
from tests.quant.quant_experts import random_weight

if ops.fallback() is not None:
    pytest.skip("there is no compiler here", allow_module_level=True)

SCHEME = QuantScheme(4, 32)
SPECS = {
    "as_qwen3": replace(SPEC, expert_intermediate_size=32, num_experts=12, experts_per_token=3),
    "as_llama4": replace(CHUNKED, expert_intermediate_size=32, chunk_size=64),
}


class Run:
    """A decoder over experts in a file, with so many slots in main memory."""

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        asks: bool = False,
        slots: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        """`asks`: every layer asks for its experts, though they stay."""
        self.spec = spec
        layout = ExpertLayout(spec.hidden_size, spec.expert_intermediate_size, SCHEME)
        spans = _expert_file(spec, layout, folder / f"experts-{len(list(folder.iterdir()))}")
        self.total = len(spans)
        arena = HostArena((slots or self.total) * layout.slot_nbytes, layout.slot_nbytes)
        self.manager = ExpertManager(DiskTier(spans), arena, trace=trace)
        self.usage = ExpertUsage(spec.moe_layers, spec.num_experts)
        self.experts = OffloadedExperts(self.manager, layout, spec, self.usage)
        self.begun = 0  # layers that asked
        begin = self.experts.begin

        def counted(layer: int, *arguments: Tensor) -> Pending:
            self.begun += 1
            return begin(layer, *arguments)

        self.experts.begin = counted  # type: ignore[method-assign, assignment]
        if asks:
            self.experts.resident = lambda layer: None  # type: ignore[method-assign, assignment]
        self.decoder = Decoder(spec, random_weights(spec).__getitem__, self.experts)
        self.caches = [KvCache(spec, 64) for _ in range(4)]

    def step(self, *counts: int) -> Tensor:
        """Logits after so many tokens of each sequence; the same ones in every run."""
        starts = [cache.length for cache in self.caches]
        tokens = [
            (7 * row + 3 * (start + i)) % self.spec.vocab_size
            for row, (start, count) in enumerate(zip(starts, counts, strict=False))
            for i in range(count)
        ]
        pieces = zip(self.caches, starts, counts, strict=False)
        slices = tuple(SequenceSlice(*piece) for piece in pieces)
        return self.decoder.forward(Batch(torch.tensor(tokens), slices))

    def all_steps(self) -> Tensor:
        """Logits of steps of one sequence and of several."""
        steps = [self.step(1) for _ in range(6)] + [self.step(3, 1, 2), self.step(1, 1, 1, 1)]
        return torch.cat([*steps, *(self.step(1) for _ in range(4))])

    def close(self) -> None:
        self.manager.check_integrity(deep=True)
        self.manager.close()


def _expert_file(
    spec: ModelSpec, layout: ExpertLayout, path: Path
) -> dict[tuple[int, int], ExpertSpan]:
    spans = {}
    with path.open("wb") as out:
        for layer in spec.moe_layers:
            for expert in range(spec.num_experts):
                seed = 1000 * layer + 3 * expert
                parts = [
                    random_weight(*shape, SCHEME, seed + i)
                    for i, shape in enumerate(layout.projections.values())
                ]
                blob = torch.empty(layout.nbytes, dtype=torch.uint8)
                layout.write(ExpertWeights(*parts), blob)
                spans[layer, expert] = ExpertSpan(path, out.tell(), layout.nbytes)
                out.write(blob.numpy().tobytes().ljust(layout.slot_nbytes, b"\0"))
    return spans


@pytest.fixture(params=SPECS)
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made = []

    def make(**options: object) -> Run:
        run = Run(SPECS[request.param], tmp_path, **options)  # type: ignore[arg-type]
        made.append(run)
        return run

    yield make
    for run in made:
        run.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nothing_differs_where_nobody_asks(runs: Callable[..., Run], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        asking, quick = runs(asks=True), runs()
        expected, found = asking.all_steps(), quick.all_steps()
    finally:
        torch.set_num_threads(before)
    assert expected.std() > 0.1
    assert torch.equal(found, expected)
    assert quick.begun < asking.begun
    assert quick.usage.counts == asking.usage.counts
    stats, others = quick.manager.stats, asking.manager.stats
    assert (stats.hits, stats.misses) == (others.hits, others.misses)
    assert stats.hits > 0


def test_nobody_is_asked_once_all_experts_came(runs: Callable[..., Run]) -> None:
    run = runs()
    for layer in run.spec.moe_layers:
        ids = torch.arange(run.spec.num_experts)[:, None]  # [E, 1]
        hidden = torch.zeros(len(ids), run.spec.hidden_size)
        run.experts.begin(layer, hidden, ids, torch.ones(ids.shape)).result()
    begun = run.begun
    run.all_steps()
    assert run.begun == begun
    assert run.manager.stats.misses == run.total


def test_experts_that_may_go_are_asked_for(runs: Callable[..., Run]) -> None:
    """With a slot too few, one evicts another: where it lay, somebody else may lie."""
    run = runs(asks=True)
    short = runs(slots=run.total - 1)
    assert all(short.experts.resident(layer) is None for layer in short.spec.moe_layers)
    assert torch.equal(short.all_steps(), run.all_steps())


def test_a_trace_hears_of_every_request(runs: Callable[..., Run]) -> None:
    trace = Trace()
    run = runs(trace=trace)
    run.all_steps()
    assert len(trace) == run.begun
    assert trace.num_requests == run.manager.stats.requests


def test_a_layer_looks_at_each_step_whether_it_must_ask(runs: Callable[..., Run]) -> None:
    run = runs()
    run.all_steps()
    begun: int = run.begun
    residents: dict[int, None] = {}
    known = run.experts.resident

    def resident(layer: int) -> Resident | None:
        return residents.get(layer, known(layer))

    run.experts.resident = resident  # type: ignore[method-assign]
    residents[run.spec.moe_layers[0]] = None
    run.step(1)
    assert run.begun == begun + 1
