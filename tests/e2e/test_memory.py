"""Peak memory stays within the budget plus what Python and torch take by themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a run may take beyond its budget once everything is imported: buffers of the allocator,
# thread stacks, lazily loaded parts of torch.
CONSTANT_NBYTES = 40 << 20
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import json, sys
from pathlib import Path
import moecli.engine
from moecli.config import EngineConfig, SamplingConfig
# Not ru_maxrss: that begins with what the process took that started this one.
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
path, budget = Path(sys.argv[1]), int(sys.argv[2])
before = peak()
with moecli.engine.Engine.open(path, EngineConfig(ctx=256, ram_nbytes=budget, threads=1)) as engine:
    session = engine.new_session()
    prompt = engine.encode_text("every expert is wanted " * 8)
    list(engine.generate(session, prompt, SamplingConfig(temperature=1, seed=0, max_tokens=24)))
    stats, plan = engine.expert_stats(), engine.plan.to_dict()
print(json.dumps({"grown": peak() - before, "read": stats.disk_nbytes, "plan": plan}))
"""


@pytest.mark.parametrize("budget", [12 * MIB, 20 * MIB])
def test_peak_memory_is_the_budget_and_a_constant(many_experts: Path, budget: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(many_experts), str(budget)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["plan"]["ram_nbytes"] <= budget
    assert found["plan"]["disk_nbytes"] > budget / 2, "most experts were to stay on disk"
    assert found["read"] > budget, "more was read than the budget holds"
    assert found["grown"] <= budget + CONSTANT_NBYTES
