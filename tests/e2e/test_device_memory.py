"""On a device peak memory is what the plan says of VRAM and RAM together, and a constant.

The device is simulated, so that both are main memory of one process, and its peak is the sum.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_lanes import vram_for
from tests.e2e.test_memory import CONSTANT_NBYTES, MIB, ROOT

CHILD = """
import json, sys
from pathlib import Path
import torch
import moecli.engine, moecli.device
import offload.device_cache, offload.host, offload.slots
from moecli.config import SIMULATED, EngineConfig, SamplingConfig

# Not ru_maxrss: that begins with what the process took that started this one.
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
path, doubled, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
make_cache, make_arena = offload.device_cache._allocate, offload.host._allocate
empty = torch.empty

def twice_the_cache(nbytes, device):
    return make_cache(2 * nbytes, device).fill_(1)[:nbytes]

def twice_the_arena(nbytes):
    block = make_arena(2 * nbytes)
    block.write(bytes([1]) * len(block))
    return block

def twice_the_pool(self, num_slots, slot_nbytes, *arguments, **options):
    self.second = empty(num_slots * slot_nbytes, dtype=torch.uint8).fill_(1)
    make_pool(self, num_slots, slot_nbytes, *arguments, **options)

if doubled == "cache":
    offload.device_cache._allocate = twice_the_cache
if doubled == "arena":
    offload.host._allocate = twice_the_arena
make_pool = offload.slots.SlotPool.__init__
if doubled == "pools":
    offload.slots.SlotPool.__init__ = twice_the_pool

before = peak()
config = EngineConfig(ctx=256, prefill_chunk=64, threads=1, device=SIMULATED, **settings)
with moecli.engine.Engine.open(path, config) as engine:
    session = engine.new_session()
    prompt = engine.encode_text("every expert is wanted " * 8)
    list(engine.generate(session, prompt, SamplingConfig(temperature=1, seed=0, max_tokens=24)))
    stats, plan = engine.expert_stats(), engine.plan.to_dict()
print(json.dumps({"grown": peak() - before, "moved": stats.device_nbytes, "plan": plan}))
"""


def run(path: Path, doubled: str, share: float, **settings: Any) -> dict[str, Any]:
    settings["vram_nbytes"] = vram_for(path, share)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), doubled, json.dumps(settings)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    plan = found["plan"]
    # Of VRAM, CUDA itself takes nothing here.
    found["planned"] = plan["ram_nbytes"] + plan["vram_nbytes"] - plan["context_nbytes"]
    return found


@pytest.mark.parametrize(
    ("placement", "lane", "share", "ram"),
    [
        ("lru", "both", 0.9, 64),
        ("lru", "link", 0.5, 20),
        ("pinned", "both", 0.5, 30),
        ("slice", "both", 0.9, 64),
    ],
)
def test_peak_memory_is_what_the_plan_says_and_a_constant(
    many_experts: Path, placement: str, lane: str, share: float, ram: int
) -> None:
    found = run(
        many_experts, "nothing", share, placement=placement, lane=lane, ram_nbytes=ram * MIB
    )
    assert found["moved"] > found["plan"]["expert_nbytes"]
    assert found["grown"] <= found["planned"] + CONSTANT_NBYTES


@pytest.mark.parametrize(
    ("doubled", "placement", "share"),
    [("cache", "lru", 0.95), ("arena", "lru", 0.9), ("pools", "slice", 0.95)],
)
def test_a_pool_twice_as_large_is_seen(
    many_experts: Path, doubled: str, placement: str, share: float
) -> None:
    found = run(many_experts, doubled, share, placement=placement, lane="link", ram_nbytes=64 * MIB)
    assert found["grown"] > found["planned"] + CONSTANT_NBYTES
