"""A model of three times its budget: the same answer, memory within it, and reads that go ahead."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import offload.manager
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.experts import OffloadedExperts
from offload.disk import DiskTier
from quant import ops
from tests.e2e import tiny
from tests.e2e.conftest import quantize
from tests.e2e.test_memory import CONSTANT_NBYTES, MIB, ROOT

CHILD = """
import ctypes, json, mmap, os, sys
from dataclasses import replace
from pathlib import Path
import moecli.engine
from moecli.config import EngineConfig, SamplingConfig

path, budget = Path(sys.argv[1]), int(sys.argv[2]) or None
detect = moecli.engine.detect
if budget:  # a machine that has no more than the budget
    moecli.engine.detect = lambda *where: replace(detect(*where), ram_available=budget)

def cached_nbytes():
    total = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE) as pages:
            seen = (ctypes.c_ubyte * -(-len(pages) // 4096))()
            start = ctypes.c_char.from_buffer(pages)
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(pages)), seen) == 0
            del start
            total += 4096 * sum(page & 1 for page in seen)
    return total

def forget():
    for file in path.glob("*.safetensors"):
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

# Not ru_maxrss: that begins with what the process took that started this one.
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
forget()
config = EngineConfig(ctx=256, ram_nbytes=budget, threads=1)
with moecli.engine.Engine.open(path, config) as engine:
    opened = cached_nbytes()
    session = engine.new_session()
    prompt = engine.encode_text("every expert is wanted " * 8)
    list(engine.generate(session, prompt, SamplingConfig(temperature=0, max_tokens=24)))
    stats, plan = engine.expert_stats(), engine.plan
    disk = engine._parts.manager._disk
    found = {"tokens": session.tokens, "grown": peak() - before, "direct": disk.direct,
             "cached": cached_nbytes() - opened, "read": stats.disk_nbytes,
             "drop_cache": plan.drop_cache, "planned": plan.ram_nbytes,
             "experts": plan.total_experts * plan.expert_nbytes, "fixed": plan.ram_nbytes
             - plan.host_arena_nbytes}
print(json.dumps(found))
"""


def run(path: Path, budget: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(budget)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def free(many_experts: Path) -> dict:
    """A run without a budget."""
    return run(many_experts, 0)


def test_a_model_of_three_times_its_budget_answers_the_same(many_experts: Path, free: dict) -> None:
    assert not free["drop_cache"]
    budget = (free["experts"] + free["fixed"]) // 3
    tight = run(many_experts, budget)
    assert tight["tokens"] == free["tokens"]
    assert tight["planned"] <= budget
    assert tight["grown"] <= budget + CONSTANT_NBYTES
    assert tight["read"] > budget, "more was read than the budget holds"
    assert free["grown"] > free["read"], "or memory is not measured"
    assert tight["grown"] < free["grown"] - (free["read"] - budget) / 2
    assert tight["drop_cache"]
    if tight["direct"]:
        assert tight["cached"] < MIB, "experts were left in the page cache"
        assert free["cached"] > free["read"] / 2, "or that could not be seen"


class Log:
    """What happened in which order, and who waits for something to happen."""

    TIMEOUT_S = 20.0

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.reads: list[tuple[int, int]] = []

    def note(self, key: tuple[int, int]) -> None:
        with self._changed:
            self.reads.append(key)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, self.TIMEOUT_S)


@pytest.mark.parametrize("slots", [12, 40])
def test_the_next_experts_are_read_while_a_prompt_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Each computation lasts until the next read has begun: of this layer, or of the next one."""
    experts, layers = 24, tiny.LAYERS
    config = tiny.llama4_config() | {"num_local_experts": experts}
    source = tiny.write_checkpoint(tmp_path / "s", config, tiny.llama4_tensors(experts=experts))
    path = quantize(source, tmp_path / "out", 32)
    monkeypatch.setattr(offload.manager, "HELP_NBYTES", 0)  # tiny experts, but as if they were not
    log = Log()
    wanted: dict[int, set[int]] = {}  # by layer
    computed: set[tuple[int, int]] = set()
    missed: list[str] = []
    begin, routed, read_into = OffloadedExperts.begin, ops.routed_experts, DiskTier.read_into

    def noted_begin(self, layer, hidden, topk_ids, topk_weights):
        wanted[layer] = set(topk_ids.flatten().tolist())
        return begin(self, layer, hidden, topk_ids, topk_weights)

    def noted_read(self, key, buffer):
        log.note(key)
        return read_into(self, key, buffer)

    def slow_routed(hidden, ids, weights, table, layout, **rest):
        layer = max(wanted)
        computed.update((layer, expert) for expert in torch.where(table)[0].tolist())
        left = {(layer, expert) for expert in wanted[layer]} - computed
        last = not left and layer == layers - 1
        following = {(layer + 1, expert) for expert in range(experts)} | left
        if not last and not log.wait_for(lambda: not following.isdisjoint(log.reads)):
            missed.append(f"layer {layer}: nothing is read while experts are computed")
        return routed(hidden, ids, weights, table, layout, **rest)

    monkeypatch.setattr(OffloadedExperts, "begin", noted_begin)
    monkeypatch.setattr(DiskTier, "read_into", noted_read)
    monkeypatch.setattr(ops, "routed_experts", slow_routed)
    with Engine.open(path, EngineConfig(ctx=256)) as engine:
        plan = engine.plan
    budget = plan.ram_nbytes - plan.host_arena_nbytes + slots * plan.slot_nbytes
    with Engine.open(path, EngineConfig(ctx=256, ram_nbytes=budget)) as engine:
        assert engine.plan.host_slots == slots
        prompt = engine.encode_text("The quick brown fox jumps over the lazy dog. " * 4)
        sampling = SamplingConfig(temperature=0, max_tokens=1)
        list(engine.generate(engine.new_session(), prompt, sampling))
        engine.check_integrity(deep=True)
        stats = engine.expert_stats()
    assert not missed
    assert sum(len(of_layer) for of_layer in wanted.values()) > slots, "all fits at once"
    assert stats.prefetch_hits > 0, "nothing of the next layer came early"
