"""Plans against arithmetic done by hand."""

from dataclasses import replace

import pytest

from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import MemoryPlan, ModelFootprint, largest_context, make_plan

# 10 layers of 16 experts, 2 a token; an expert takes 90 of the 100 bytes of its slot
MODEL = ModelFootprint(
    dense_nbytes=1000,
    embedding_nbytes=300,
    kv_nbytes=200,
    workspace_nbytes=100,
    num_moe_layers=10,
    num_experts=16,
    experts_per_token=2,
    expert_nbytes=90,
    slot_nbytes=100,
)
MACHINE = Machine(ram_available=20_000, ram_bw=28_000.0, disk_bw=1800.0)
ACTIVE = 10 * 2 * 90


def test_ram_only_by_hand() -> None:
    plan = make_plan(MODEL, MACHINE, ram_nbytes=1600 + 40 * 100 + 99)
    assert (plan.host_slots, plan.host_arena_nbytes) == (40, 4000)
    assert (plan.ram_nbytes, plan.ram_free) == (5600, 99)
    assert plan.host_resident_share == plan.hit_rate_assumed == plan.resident_share == 0.25
    assert plan.disk_nbytes == 120 * 90
    assert plan.ram_nbytes_per_token == 1000 + ACTIVE
    assert plan.disk_nbytes_per_token == ACTIVE * 3 // 4
    # 2800 bytes at 28000/s and 1350 at 1800/s
    assert plan.predicted_tok_s == pytest.approx(1 / (0.1 + 0.75))
    assert plan.bottleneck == "disk"
    assert plan.placement == "lru"
    vram = (plan.vram_budget, plan.device_slots, plan.device_pool_nbytes, plan.vram_nbytes)
    assert vram == (0, 0, 0, 0)
    assert plan.link_nbytes_per_token == plan.vram_nbytes_per_token == 0


def test_everything_fits() -> None:
    plan = make_plan(MODEL, MACHINE, ram_nbytes=10**6)
    assert plan.host_slots == 160
    assert plan.all_resident
    assert (plan.disk_nbytes, plan.disk_nbytes_per_token) == (0, 0)
    assert plan.ram_nbytes == 1600 + 16_000
    assert plan.predicted_tok_s == pytest.approx(10.0)
    assert plan.bottleneck == "ram"


def test_experts_as_fast_as_they_are_computed_and_the_rest_as_ram_is_read() -> None:
    """By hand: 1000 dense bytes and 1800 of experts a token."""
    for ram, host, seconds, limit in (
        (28_000.0, 18_000.0, 1000 / 28_000 + 0.1, "cpu"),
        (28_000.0, 40_000.0, 0.1, "ram"),
        (1_000.0, 40_000.0, 2.8, "ram"),
        (None, 28_000.0, 0.1, "cpu"),
        (2_000.0, 18_000.0, 1.4, "ram"),
    ):
        plan = make_plan(MODEL, replace(MACHINE, ram_bw=ram, host_bw=host), ram_nbytes=10**6)
        assert plan.predicted_tok_s == pytest.approx(1 / seconds)
        assert plan.bottleneck == limit


def test_default_budget_is_four_fifths_of_what_is_available() -> None:
    plan = make_plan(MODEL, MACHINE)
    assert plan.ram_budget == 16_000
    assert plan.host_slots == 144
    with pytest.raises(OffloadError, match="cannot tell how much memory") as caught:
        make_plan(MODEL, Machine())
    assert caught.value.hint == "say it with `--ram`"


@pytest.mark.parametrize(
    ("machine", "budget", "predicted"),
    [
        (Machine(), 3000, False),
        (Machine(ram_bw=1.0), 3000, False),
        (Machine(disk_bw=1.0), 3000, False),
        (Machine(ram_bw=1.0, disk_bw=1.0), 3000, True),
        (Machine(ram_bw=1.0), 10**6, True),  # nothing to read from disk
    ],
)
def test_no_prediction_without_the_bandwidths_it_needs(
    machine: Machine, budget: int, predicted: bool
) -> None:
    plan = make_plan(MODEL, machine, ram_nbytes=budget)
    assert (plan.predicted_tok_s is not None) is predicted
    assert (plan.bottleneck is not None) is predicted


def test_the_least_budget_is_exact_and_the_error_says_it() -> None:
    least = 1600 + 2 * 100
    assert make_plan(MODEL, MACHINE, ram_nbytes=least).host_slots == 2
    with pytest.raises(OffloadError) as caught:
        make_plan(MODEL, MACHINE, ram_nbytes=least - 1)
    assert "1.76KiB of RAM" in caught.value.message
    assert "needs 1.76KiB (1.56KiB that must be there, 200B for 2 experts)" in caught.value.message
    assert caught.value.hint is not None
    assert "`--ram 1.76KiB` or more" in caught.value.hint


def test_sizes_in_hints_are_rounded_up() -> None:
    model = replace(MODEL, dense_nbytes=(5 << 30) + 1)
    with pytest.raises(OffloadError) as caught:
        make_plan(model, MACHINE, ram_nbytes=1 << 30)
    assert "1GiB of RAM" in caught.value.message
    assert caught.value.hint is not None
    assert "5.01GiB" in caught.value.hint


def test_use_beyond_what_is_available_is_told() -> None:
    plan = make_plan(MODEL, replace(MACHINE, ram_available=5000), ram_nbytes=5600)
    assert plan.ram_short == 600
    assert make_plan(MODEL, MACHINE, ram_nbytes=5600).ram_short == 0
    assert make_plan(MODEL, Machine(), ram_nbytes=5600).ram_short == 0


def test_the_page_cache_is_used_only_where_it_can_hold_all_experts() -> None:
    nbytes = 5600  # of the plan; all experts are 16000
    fits = replace(MACHINE, ram_available=nbytes + 16_000)
    assert not make_plan(MODEL, fits, ram_nbytes=nbytes).drop_cache
    short = replace(MACHINE, ram_available=nbytes + 15_999)
    assert make_plan(MODEL, short, ram_nbytes=nbytes).drop_cache
    assert not make_plan(MODEL, Machine(), ram_nbytes=nbytes).drop_cache


def test_to_dict_holds_fields_and_derived_numbers() -> None:
    plan = make_plan(MODEL, MACHINE, ram_nbytes=5600)
    data = plan.to_dict()
    for name, value in data.items():
        assert getattr(plan, name) == value
    assert set(MemoryPlan.__dataclass_fields__) < set(data)
    assert data["host_arena_nbytes"] == 4000


@pytest.mark.parametrize("budget", [1401 + 200, 2000, 5000])
def test_largest_context_is_the_last_that_fits(budget: int) -> None:
    def kv_nbytes(ctx: int) -> int:
        return 3 * min(ctx, 50) + ctx

    def at(ctx: int) -> ModelFootprint:
        return replace(MODEL, kv_nbytes=kv_nbytes(ctx))

    best = largest_context(at, MACHINE, 10_000, ram_nbytes=budget)
    fitting = [ctx for ctx in range(1, 10_001) if 1400 + kv_nbytes(ctx) + 200 <= budget]
    assert best == (fitting[-1] if fitting else None)


def test_largest_context_is_capped_by_the_model() -> None:
    assert largest_context(lambda _: MODEL, MACHINE, 77, ram_nbytes=10**6) == 77


def test_prompts_without_a_device_by_hand() -> None:
    """1000 tokens choose all experts; 120 of 160 are on disk."""
    model = replace(MODEL, prefill_tokens=1000, active_weights=50)
    machine = replace(MACHINE, host_flops=1e4)
    budget = 1600 + 40 * 100
    limits = {
        "cpu": (machine, 1e4 / (2 * 50)),
        "disk": (replace(machine, host_flops=1e9), 1000 / (120 * 90 / 1800)),
        "ram": (
            *(replace(machine, host_flops=1e9, disk_bw=1e9),),
            1000 / ((1000 + 160 * 90) / 28_000),
        ),
    }
    for name, (described, tok_s) in limits.items():
        plan = make_plan(model, described, budget)
        assert plan.prefill_bottleneck == name
        assert plan.predicted_prefill_tok_s == pytest.approx(tok_s)
    few = make_plan(replace(model, prefill_tokens=1), replace(limits["disk"][0]), budget)
    assert few.predicted_prefill_tok_s == pytest.approx(1800 / (20 * 90 * 0.75)), "two a layer"
    for unknown in (replace(machine, host_flops=None), replace(machine, disk_bw=None)):
        assert make_plan(model, unknown, budget).predicted_prefill_tok_s is None
    assert make_plan(MODEL, machine, budget).predicted_prefill_tok_s is None
