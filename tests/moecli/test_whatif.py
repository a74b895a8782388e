"""What one more step buys is what the plan of that machine predicts, and nothing else is told."""

from dataclasses import replace

from moecli import known
from moecli.config import EngineConfig
from moecli.models.hf_outline import read_counted
from moecli.planning import Question, plan_model
from moecli.units import GIB
from moecli.whatif import Step, steps
from offload.hardware import Machine
from quant.scheme import QuantScheme

INT4, INT8 = QuantScheme.parse("int4"), QuantScheme.parse("int8")
MACHINE = Machine(
    *(64 * GIB, 60 * GIB),
    **{"ram_bw": 60e9, "disk_bw": 7e9, "link_bw": 25e9, "zero_copy_bw": 24e9},
    **{"host_bw": 50e9, "vram_bw": 1e12},
)


def question(name: str, vram: int | None, ram: int, machine: Machine = MACHINE) -> Question:
    spec = known.find(name)
    assert spec is not None
    config = EngineConfig(ram_nbytes=ram, vram_nbytes=vram)
    return Question(read_counted(spec.config()), (INT4, INT8), 8192, config, machine)


def taken(asked: Question) -> dict[str, Step]:
    return {step.what: step for step in steps(asked, asked.answer())}


def test_each_step_is_the_plan_of_the_changed_machine() -> None:
    asked = question("llama4-maverick", 24 * GIB, 64 * GIB)
    found = taken(asked)
    ram = replace(asked.config, ram_nbytes=80 * GIB)
    both = {"ram_bw": 120e9, "host_bw": 100e9}
    changed = {
        "16 GiB more RAM": replace(asked, config=ram),
        "a disk twice as fast": replace(asked, machine=replace(MACHINE, disk_bw=14e9)),
        "RAM and processor twice as fast": replace(asked, machine=replace(MACHINE, **both)),
        "experts in int8-g128": replace(asked, schemes=(INT8, INT8)),
    }
    assert set(changed) <= set(found)
    for what, other in changed.items():
        plan = plan_model(other.spec, other.schemes, other.ctx, other.config, other.machine)
        assert found[what] == Step(what, plan.predicted_tok_s, plan.bottleneck), what


def test_vram_and_link() -> None:
    asked = question("qwen3-30b-a3b", 12 * GIB, 64 * GIB, replace(MACHINE, host_bw=None))
    found = taken(asked)
    larger = replace(asked.config, vram_nbytes=20 * GIB)
    more = replace(asked, config=larger).answer()
    faster = replace(asked.machine, link_bw=50e9, zero_copy_bw=48e9)
    linked = replace(asked, machine=faster).answer()
    assert found["8 GiB more VRAM"].tok_s == more.predicted_tok_s
    assert found["a link twice as fast"].tok_s == linked.predicted_tok_s
    assert "a disk twice as fast" not in found, "nothing is read from disk"
    assert "16 GiB more RAM" not in found, "all are in RAM"


def test_where_nothing_is_lacking_only_the_scheme_changes_anything() -> None:
    assert set(taken(question("qwen3-30b-a3b", 80 * GIB, 64 * GIB))) == {"experts in int8-g128"}


def test_without_a_card_none_is_spoken_of() -> None:
    found = taken(question("llama4-scout", None, 48 * GIB))
    assert "16 GiB more RAM" in found
    assert not [what for what in found if "VRAM" in what or "link" in what]


def test_a_budget_that_is_what_the_machine_has_free_is_the_one_that_grows() -> None:
    asked = question("llama4-scout", None, 48 * GIB)
    free = replace(asked, config=EngineConfig(), machine=replace(MACHINE, ram_available=60 * GIB))
    plan = free.answer()
    assert plan.ram_budget == int(0.8 * 60 * GIB)
    found = {step.what: step for step in steps(free, plan)}
    more = replace(free, config=EngineConfig(ram_nbytes=plan.ram_budget + 16 * GIB)).answer()
    assert found["16 GiB more RAM"].tok_s == more.predicted_tok_s


def test_a_step_that_does_not_fit_says_so() -> None:
    asked = question("llama4-scout", 24 * GIB, 64 * GIB)
    plan = asked.answer()
    least = plan.dense_nbytes + plan.kv_nbytes + plan.workspace_nbytes + plan.context_nbytes
    config = replace(asked.config, vram_nbytes=least + 2 * plan.slot_nbytes)
    found = taken(replace(asked, config=config))
    assert found["experts in int8-g128"] == Step("experts in int8-g128", None, None)


def test_without_a_prediction_there_is_nothing_to_compare() -> None:
    asked = question("llama4-maverick", 24 * GIB, 64 * GIB, replace(MACHINE, disk_bw=None))
    assert steps(asked, asked.answer()) == ()
