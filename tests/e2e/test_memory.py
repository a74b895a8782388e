"""Peak memory stays within the budget plus what Python and torch take by themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.conftest import quantize

# What a run may take beyond its budget once everything is imported: buffers of the allocator,
# thread stacks, lazily loaded parts of torch.
CONSTANT_NBYTES = 40 << 20
MIB = 1 << 20

CHILD = """
import json, resource, sys
from pathlib import Path
import moecli.engine
from moecli.config import EngineConfig, SamplingConfig
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
path, budget = Path(sys.argv[1]), int(sys.argv[2])
before = peak()
with moecli.engine.Engine.open(path, EngineConfig(ctx=256, ram_nbytes=budget, threads=1)) as engine:
    session = engine.new_session()
    prompt = engine.encode_text("every expert is wanted " * 8)
    list(engine.generate(session, prompt, SamplingConfig(temperature=1, seed=0, max_tokens=24)))
    stats, plan = engine.expert_stats(), engine.plan.to_dict()
print(json.dumps({"grown": peak() - before, "read": stats.disk_nbytes, "plan": plan}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with some 40 MiB of experts, far more than the budgets below."""
    root = tmp_path_factory.mktemp("wide")
    experts, inner = 96, 1024
    config = tiny.llama4_config() | {"num_local_experts": experts, "intermediate_size": inner}
    tensors = tiny.llama4_tensors(experts=experts, inner=inner)
    return quantize(tiny.write_checkpoint(root / "source", config, tensors), root / "out", 32)


@pytest.mark.parametrize("budget", [12 * MIB, 20 * MIB])
def test_peak_memory_is_the_budget_and_a_constant(wide: Path, budget: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(wide), str(budget)],
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
