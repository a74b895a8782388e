"""What a plan had predicted stands beside what was counted, for each memory."""

from dataclasses import replace

import pytest

from moecli.beside import Pair, beside
from moecli.events import GenerationStats
from moecli.run_view import show_timings
from offload.hardware import Machine
from offload.plan import ModelFootprint, make_plan
from offload.stats import CacheStats

MODEL = ModelFootprint(
    dense_nbytes=1000,
    embedding_nbytes=100,
    kv_nbytes=100,
    workspace_nbytes=100,
    num_moe_layers=10,
    num_experts=4,
    experts_per_token=1,
    expert_nbytes=100,
    slot_nbytes=100,
    intermediate_size=10,
    group_size=1,
)
MACHINE = Machine(ram_available=10_000, ram_bw=1e5, disk_bw=1e5)
STATS = GenerationStats(
    *(20, 0, 9, 0.5, 40.0, 20.0, 30, 10, 500, 300),
    decode_steps=8,
    decoded=CacheStats(hits=60, misses=20, disk_nbytes=2000),
    grown_rss_nbytes=250,
)


def test_on_the_processor_by_hand() -> None:
    plan = make_plan(MODEL, MACHINE, 1300 + 30 * 100)  # of 40 experts
    found = beside(plan, STATS)
    assert found.tok_s == Pair(plan.predicted_tok_s, 20.0)
    assert found.hit_rate == Pair(0.75, 0.75)
    assert found.a_token == {"ram": Pair(2000, 2000.0), "disk": Pair(250, 250.0)}
    assert found.ram_nbytes == Pair(plan.ram_nbytes, 250)
    assert found.vram_nbytes == Pair(None, None)


def test_what_was_read_and_not_planned_is_there_too() -> None:
    plan = make_plan(MODEL, MACHINE, 1300 + 40 * 100)
    assert beside(plan, STATS).a_token["disk"] == Pair(0, 250.0)
    short = replace(STATS, decode_steps=0, decoded=CacheStats(), decode_tok_s=0.0)
    assert beside(plan, short).a_token == {"ram": Pair(2000, None)}, "one token, no decoding"
    assert beside(plan, short).tok_s.measured is None


def test_with_a_device_by_hand() -> None:
    machine = replace(MACHINE, vram_bw=1e6, link_bw=1e4, zero_copy_bw=1e4, host_bw=1e4)
    machine = replace(machine, context_nbytes=0)
    plan = make_plan(MODEL, machine, 10_000, 1200 + 24 * 100, placement="lru", lane="link")
    decoded = CacheStats(hits=50, misses=30, fetched=20, linked=8, hosted=2, device_nbytes=2800)
    found = beside(plan, replace(STATS, decoded=decoded, peak_vram_nbytes=3000))
    assert found.a_token["ram"].measured == 2 * 100 / 8
    assert found.a_token["vram"].measured == 1000 + 70 * 100 / 8
    assert found.a_token["link"] == Pair(plan.link_nbytes_per_token, 350.0)
    assert found.vram_nbytes == Pair(plan.vram_nbytes, 3000)


def test_slices_are_neither_hits_nor_misses() -> None:
    machine = replace(MACHINE, vram_bw=1e6, link_bw=1e4, host_bw=1e4, context_nbytes=0)
    # Rows of 4 KiB: the smallest slice is a page.
    model = replace(MODEL, expert_nbytes=40_960, slot_nbytes=40_960)
    plan = make_plan(model, machine, 10**7, 10**6, placement="slice")
    assert plan.slice_size
    assert beside(plan, STATS).hit_rate.planned is None


@pytest.mark.parametrize(
    ("ram_bw", "words"),
    [
        (1e5, "(planned: at most 50.0, limited by RAM bandwidth)"),
        (1e4, "limited by RAM bandwidth; faster than that, so `moecli doctor --refresh` should"),
        (None, "(not planned: a bandwidth is not measured yet; `moecli plan` does that)"),
        (1e9, "(planned: over 1000: bandwidth does not limit so small a model)"),
    ],
)
def test_no_plan_promises_less_than_was_measured(
    capsys: pytest.CaptureFixture[str], ram_bw: float | None, words: str
) -> None:
    plan = make_plan(MODEL, replace(MACHINE, ram_bw=ram_bw), 10_000)
    show_timings(STATS, plan)
    assert words in capsys.readouterr().err
