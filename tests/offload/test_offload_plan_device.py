"""Plans for a graphics card: arithmetic done by hand."""

from dataclasses import replace

import pytest

from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import (
    CONTEXT_ASSUMED,
    VRAM_MARGIN,
    MemoryPlan,
    ModelFootprint,
    largest_context,
    make_plan,
    plan_context,
)

# 10 layers of 16 experts, 2 a token; an expert takes 10 bytes a row, 5120 of the 8192 of its slot
SLOT = 8192
EXPERT = 5120
MODEL = ModelFootprint(
    dense_nbytes=100_000,
    embedding_nbytes=30_000,
    kv_nbytes=20_000,
    workspace_nbytes=9_000,
    num_moe_layers=10,
    num_experts=16,
    experts_per_token=2,
    expert_nbytes=EXPERT,
    slot_nbytes=SLOT,
    intermediate_size=512,
    group_size=64,
    device_workspace_nbytes=10_000,
)
FIXED = 100_000 + 20_000 + 10_000 + 7_000
MACHINE = Machine(
    ram_available=10**7,
    ram_bw=1e6,
    disk_bw=5e4,
    link_bw=2e5,
    vram_bw=2e6,
    context_nbytes=7_000,
)
ACTIVE = 10 * 2 * EXPERT


def device_plan(slots: int, **wishes: str) -> MemoryPlan:
    """With room for so many whole experts, those on their way included."""
    return make_plan(MODEL, MACHINE, 10**7, FIXED + slots * SLOT + 77, **wishes)


def test_lru_by_hand() -> None:
    plan = device_plan(88, placement="lru")
    assert (plan.placement, plan.lanes, plan.on_device) == ("lru", ("link",), True)
    assert (plan.staging_slots, plan.device_slots, plan.slice_size) == (11, 77, 0)
    assert (plan.vram_nbytes, plan.vram_free) == (FIXED + 88 * SLOT, 77)
    assert (plan.workspace_nbytes, plan.context_nbytes) == (10_000, 7_000)
    assert plan.host_slots == 160, "a copy of what may have to leave VRAM"
    assert plan.ram_nbytes == 30_000 + SLOT + 160 * SLOT
    assert plan.bounce_nbytes == SLOT
    assert plan.hit_rate_assumed == plan.device_resident_share == 77 / 160
    assert (plan.disk_nbytes, plan.all_resident, plan.resident_share) == (0, True, 1)
    missing = ACTIVE * 83 / 160
    assert plan.link_nbytes_per_token == round(missing)
    assert plan.vram_nbytes_per_token == 100_000 + ACTIVE, "slots are read after a fetch too"
    assert plan.ram_nbytes_per_token == plan.disk_nbytes_per_token == 0
    seconds = (100_000 + ACTIVE) / 2e6 + missing / 2e5
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)
    assert plan.link_tok_s == plan.predicted_tok_s
    assert plan.host_tok_s is None
    assert (plan.bottleneck, plan.link_share) == ("link", 1)


def test_pinned_needs_no_copies_in_main_memory() -> None:
    plan = device_plan(88, placement="pinned")
    assert (plan.placement, plan.lanes) == ("pinned", ("link",))
    assert (plan.device_slots, plan.host_slots, plan.resident_experts) == (77, 83, 160)
    assert plan.vram_nbytes_per_token == round(100_000 + ACTIVE * 77 / 160)
    little = make_plan(MODEL, MACHINE, 30_000 + 41 * SLOT, FIXED + 88 * SLOT, placement="pinned")
    assert (little.host_slots, little.resident_experts) == (40, 117)
    assert little.disk_nbytes == 43 * EXPERT
    assert little.disk_nbytes_per_token == round(ACTIVE * 43 / 160)


def test_slice_by_hand() -> None:
    """512 rows of 10 bytes; a slice begins on a page, so one page holds 6 groups of 64."""
    plan = device_plan(91, placement="slice")
    assert (plan.placement, plan.slice_size, plan.slice_nbytes) == ("slice", 384, 4096)
    assert (plan.device_slots, plan.staging_slots) == (0, 11)
    assert plan.device_pool_nbytes == 160 * 4096
    assert plan.vram_nbytes == FIXED + 160 * 4096 + 11 * SLOT
    assert plan.device_resident_share == plan.hit_rate_assumed == 0.75
    assert plan.vram_nbytes_per_token == 100_000 + ACTIVE * 3 // 4
    assert plan.link_nbytes_per_token == ACTIVE // 4
    assert plan.link_size == 128
    seconds = (100_000 + ACTIVE * 3 / 4) / 2e6 + ACTIVE / 4 / 2e5
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)


def test_a_slice_has_fewer_rows_than_the_expert() -> None:
    """Even where slots are so much larger than experts that all rows would fit as slices."""
    model = replace(MODEL, expert_nbytes=4096)
    plan = make_plan(model, MACHINE, 10**7, FIXED + 91 * SLOT, placement="slice")
    assert (plan.slice_size, plan.slice_nbytes) == (448, 4096)


@pytest.mark.parametrize(
    ("rows", "group", "units"),
    [
        (8192, 32, (256, 128, 32)),
        (768, 64, (256, 128, 64)),
        (640, 128, (128,)),
        (96, 32, (32,)),
        (768, 96, (96,)),
        (0, 0, ()),
    ],
)
def test_units_of_a_slice_divide_what_remains(
    rows: int, group: int, units: tuple[int, ...]
) -> None:
    model = replace(MODEL, expert_nbytes=8192 * 15, slot_nbytes=8192 * 15)
    assert replace(model, intermediate_size=rows, group_size=group).slice_units == units


def test_both_lanes_divide_the_rows_of_a_slice() -> None:
    """One page of VRAM for each expert; the link has a quarter of what the lanes reach together."""
    machine = replace(MACHINE, host_bw=6e5)

    def sliced(rows: int, expert_nbytes: int) -> MemoryPlan:
        model = replace(
            *(MODEL,), group_size=32, intermediate_size=rows, expert_nbytes=expert_nbytes
        )
        vram = FIXED + 91 * SLOT
        return make_plan(model, machine, 10**7, vram, placement="slice", lane="both")

    plan = sliced(160, 5120)  # 32 rows remain: one group, for the faster lane
    assert (plan.slice_size, plan.link_size) == (128, 0)
    assert (plan.link_share, plan.lanes) == (0, ("link", "host"))
    plan = sliced(512, 8192)  # 256 remain: dividing them in halves would not do
    assert (plan.slice_size, plan.link_size) == (256, 64)
    plan = sliced(2048, 8192)  # 1024 remain
    assert (plan.slice_size, plan.link_size, plan.link_share) == (1024, 256, 0.25)
    active = 10 * 2 * 8192
    seconds = (100_000 + active / 2) / 2e6 + active / 2 / 8e5
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)
    assert plan.bottleneck == "link and cpu"
    assert (plan.link_nbytes_per_token, plan.ram_nbytes_per_token) == (active // 8, active * 3 // 8)


def test_lanes_share_the_bandwidth_of_main_memory() -> None:
    machine = replace(MACHINE, host_bw=6e5, ram_bw=4e5, vram_bw=1e8)
    model = replace(MODEL, intermediate_size=1024)
    vram = FIXED + 91 * SLOT
    plan = make_plan(model, machine, 10**7, vram, placement="slice", lane="both")
    rest = ACTIVE * (1 - plan.device_resident_share)
    seconds = (100_000 + ACTIVE * plan.device_resident_share) / 1e8 + rest / 4e5
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)
    assert plan.bottleneck == "ram"


def test_misses_of_a_token_are_divided_whole() -> None:
    """Two choices, each missing with 1/2: a single miss goes to the faster lane, two divide."""
    machine = replace(MACHINE, host_bw=1e5)
    model = replace(MODEL, num_experts=4, num_moe_layers=40)
    plan = make_plan(model, machine, 10**7, FIXED + (80 + 8) * SLOT, placement="lru", lane="both")
    assert (plan.device_slots, plan.staging_slots) == (80, 8)
    one, two = EXPERT / 2e5, 2 * EXPERT / 2e5  # for two, both by the link end as soon
    seconds = (100_000 + 40 * 2 * EXPERT) / 2e6 + 40 * (one / 2 + two / 4)
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)
    assert plan.link_share == 1
    even = replace(machine, host_bw=2e5)
    plan = make_plan(model, even, 10**7, FIXED + 88 * SLOT, placement="lru", lane="both")
    seconds = (100_000 + 40 * 2 * EXPERT - 40 * EXPERT / 4) / 2e6 + 40 * (one / 2 + one / 4)
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)
    assert plan.link_share == pytest.approx((1 / 2 + 1 / 4) / (1 / 2 + 2 / 4))


def test_one_choice_a_token_is_sliced_where_both_lanes_gain() -> None:
    few = replace(
        MODEL, experts_per_token=1, num_experts=4, intermediate_size=2048, expert_nbytes=8192
    )
    even = replace(MACHINE, host_bw=2e5)
    vram = FIXED + 25 * SLOT
    plan = make_plan(few, even, 10**7, vram)
    assert (plan.placement, plan.lanes) == ("slice", ("link", "host"))
    assert make_plan(few, even, 10**7, vram, lane="link").placement == "lru"
    slow = replace(MACHINE, host_bw=1e4)
    assert make_plan(few, slow, 10**7, vram).placement == "lru"
    alone = replace(MACHINE, host_bw=8e5)
    plan = make_plan(few, alone, 10**7, vram)
    assert plan.predicted_tok_s == pytest.approx(
        max(
            make_plan(few, alone, 10**7, vram, placement=placement).predicted_tok_s or 0
            for placement in ("lru", "pinned", "slice")
        ),
        rel=0.1,
    )


def test_slots_follow_use_though_the_processor_serves_every_miss() -> None:
    one = replace(MODEL, experts_per_token=1, intermediate_size=64)  # cannot be sliced
    fast = replace(MACHINE, host_bw=8e5)
    vram = FIXED + 88 * SLOT
    plan = make_plan(one, fast, 10**7, vram)
    assert (plan.placement, plan.lanes, plan.link_share) == ("lru", ("link", "host"), 0)
    assert plan.link_counts[:3] == (0, 0, 0)
    # In the time of one expert the link brings a quarter of one, less the time for its hits.
    assert plan.link_idle[:2] == (0, EXPERT // 4)
    two = make_plan(replace(one, experts_per_token=2), fast, 10**7, vram)
    assert two.link_idle[1] == int(EXPERT * (1 / 8e5 - 1 / 2e6) * 2e5)
    little = make_plan(one, fast, 30_000 + SLOT + 100 * SLOT, vram)
    assert (little.placement, little.lanes) == ("pinned", ("host",)), "RAM lacks what VRAM holds"
    assert make_plan(one, fast, 10**7, vram, lane="link").link_idle[:3] == (0, 0, 0)


def test_everything_in_vram() -> None:
    plan = device_plan(160)
    assert (plan.placement, plan.lanes, plan.device_slots) == ("pinned", (), 160)
    assert (plan.staging_slots, plan.host_slots, plan.link_share) == (0, 2, 0)
    assert not plan.embedding_on_device
    assert plan.predicted_tok_s == pytest.approx(2e6 / (100_000 + ACTIVE))
    assert (plan.bottleneck, plan.link_tok_s) == ("vram", plan.predicted_tok_s)
    assert device_plan(160, placement="lru").placement == "lru"
    vram = FIXED + 160 * SLOT + 30_000
    roomy = make_plan(MODEL, MACHINE, 10**7, vram)
    assert roomy.embedding_on_device
    assert (roomy.vram_nbytes, roomy.ram_nbytes) == (vram, 3 * SLOT)
    assert not make_plan(MODEL, MACHINE, 10**7, vram - 1).embedding_on_device


def test_what_memory_lacks_comes_from_disk() -> None:
    ram = 30_000 + SLOT + 100 * SLOT
    lru = make_plan(MODEL, MACHINE, ram, FIXED + 88 * SLOT, placement="lru")
    assert lru.disk_nbytes == 60 * EXPERT, "VRAM holds copies of what RAM holds"
    pinned = make_plan(MODEL, MACHINE, ram, FIXED + 88 * SLOT)
    assert (pinned.placement, pinned.disk_nbytes) == ("pinned", 0), "and here it does not"
    sliced = make_plan(MODEL, MACHINE, ram, FIXED + 91 * SLOT, placement="slice")
    assert sliced.disk_nbytes == 60 * EXPERT
    assert sliced.disk_nbytes_per_token == ACTIVE * 60 // 160


def test_prefill_streams_what_vram_lacks() -> None:
    model = replace(MODEL, prefill_tokens=1)
    vram = FIXED + 88 * SLOT
    # one token: 2 of 16 experts a layer
    plan = make_plan(model, MACHINE, 10**7, vram, placement="lru")
    assert plan.predicted_prefill_tok_s == pytest.approx(2e5 / (ACTIVE * 83 / 160))
    sliced = make_plan(model, MACHINE, 10**7, FIXED + 91 * SLOT, placement="slice")
    assert sliced.predicted_prefill_tok_s == pytest.approx(4 * 2e5 / ACTIVE), "a quarter passes"
    long = replace(MODEL, prefill_tokens=1000)
    chunk = make_plan(long, MACHINE, 10**7, vram, placement="lru")
    assert chunk.predicted_prefill_tok_s == pytest.approx(1000 * 2e5 / (83 * EXPERT))
    assert (
        make_plan(model, replace(MACHINE, link_bw=None), 10**7, vram).predicted_prefill_tok_s
        is None
    )
    assert make_plan(MODEL, MACHINE, 10**7, vram).predicted_prefill_tok_s is None


def test_zero_copy_counts_where_it_was_measured() -> None:
    machine = replace(MACHINE, zero_copy_bw=1e5)
    plan = make_plan(MODEL, machine, 10**7, FIXED + 88 * SLOT, placement="lru")
    seconds = (100_000 + ACTIVE) / 2e6 + ACTIVE * 83 / 160 / 1e5
    assert plan.predicted_tok_s == pytest.approx(1 / seconds)


@pytest.mark.parametrize("missing", ["vram_bw", "link_bw"])
def test_an_unknown_bandwidth_leaves_the_simplest_plan_and_no_prediction(missing: str) -> None:
    machine = replace(MACHINE, host_bw=1e9, **{missing: None})
    plan = make_plan(MODEL, machine, 10**7, FIXED + 88 * SLOT)
    assert (plan.placement, plan.lanes, plan.predicted_tok_s) == ("lru", ("link",), None)
    assert plan.device_slots == 77


def test_default_budget_respects_what_others_use() -> None:
    free = 4 << 30
    machine = Machine(ram_available=10**7, vram_total=8 << 30, vram_free=free)
    plan = make_plan(MODEL, machine)
    assert plan.vram_budget == free - VRAM_MARGIN
    assert plan.context_nbytes == CONTEXT_ASSUMED
    assert plan.vram_short == 0
    assert make_plan(MODEL, machine, vram_nbytes=0).vram_budget == 0
    full = replace(machine, vram_free=1000)
    with pytest.raises(OffloadError, match="0B of VRAM are too little"):
        make_plan(MODEL, full)
    asked = make_plan(MODEL, replace(machine, vram_free=CONTEXT_ASSUMED), vram_nbytes=5 << 30)
    assert asked.vram_short == asked.vram_nbytes - CONTEXT_ASSUMED


@pytest.mark.parametrize("placement", ["auto", "lru", "slice", "pinned"])
def test_the_least_vram_is_exact_and_the_error_says_it(placement: str) -> None:
    rooms = {"auto": 2 * SLOT, "pinned": 2 * SLOT, "lru": 4 * SLOT}
    rooms["slice"] = 160 * 4096 + 2 * SLOT
    least = FIXED + rooms[placement]
    plan = make_plan(MODEL, MACHINE, 10**7, least, placement=placement)
    assert plan.vram_nbytes <= least
    assert placement in ("auto", plan.placement)
    with pytest.raises(OffloadError, match="of VRAM are too little") as caught:
        make_plan(MODEL, MACHINE, 10**7, least - 1, placement=placement)
    assert caught.value.hint is not None
    assert f"--vram {-(-least * 100 // 1024) / 100:g}KiB" in caught.value.hint
    assert "97.66KiB of dense weights, 19.53KiB of KV cache" in caught.value.message
    alone = placement in ("lru", "slice")
    assert ("`--placement auto` fits" in caught.value.hint) is alone
    named = f"with `--placement {placement}`" in caught.value.message
    assert named is (placement != "auto")


def test_a_card_that_can_never_hold_it_is_not_asked_for_more() -> None:
    with pytest.raises(OffloadError) as caught:
        make_plan(MODEL, replace(MACHINE, vram_total=FIXED), 10**7, FIXED)
    assert caught.value.hint == "give a shorter context with `--ctx`; `--device cpu` needs no VRAM"


def test_wishes_that_contradict_each_other() -> None:
    with pytest.raises(OffloadError, match="nothing would ever come") as caught:
        device_plan(88, placement="lru", lane="cpu")
    assert "`--lane both`" in (caught.value.hint or "")


def test_a_context_that_does_not_fit_names_the_longest_that_does() -> None:
    def at(ctx: int) -> ModelFootprint:
        return replace(MODEL, kv_nbytes=20 * ctx)

    vram = FIXED - 20_000 + 3 * SLOT + 20 * 500 + 7
    largest = 500 + SLOT // 20  # with two experts on their way
    assert largest_context(at, MACHINE, 10**6, 10**7, vram) == largest
    plan = plan_context(at, MACHINE, largest, 10**7, vram)
    assert plan == make_plan(at(largest), MACHINE, 10**7, vram)
    with pytest.raises(OffloadError, match="of VRAM are too little") as caught:
        plan_context(at, MACHINE, 5000, 10**7, vram)
    assert caught.value.hint == f"a context of {largest} tokens fits: `--ctx {largest}`"
    with pytest.raises(OffloadError) as caught:
        plan_context(at, MACHINE, 5000, 10**7, 1000)
    assert "--vram" in (caught.value.hint or "")


def test_the_bandwidth_that_limits_a_prompt_is_named() -> None:
    model = replace(MODEL, prefill_tokens=1000)
    vram = FIXED + 88 * SLOT
    fast = replace(MACHINE, link_bw=1e9)
    limits = {"link": (MACHINE, 10**7), "vram": (fast, 10**7), "disk": (fast, 60 * SLOT)}
    for name, (machine, ram) in limits.items():
        plan = make_plan(model, machine, ram, vram, placement="lru")
        assert plan.prefill_bottleneck == name
    assert make_plan(MODEL, MACHINE, 10**7, vram).prefill_bottleneck is None


def test_slots_that_follow_use_are_no_good_where_all_are_used_in_turn() -> None:
    whole = replace(MODEL, intermediate_size=0)  # it cannot be sliced
    dense = replace(whole, num_experts=1, experts_per_token=1, num_moe_layers=160)
    plans = [make_plan(model, MACHINE, 10**7, FIXED + 88 * SLOT) for model in (whole, dense)]
    assert [plan.placement for plan in plans] == ["lru", "pinned"]


def test_a_shorter_context_is_advised_only_where_it_could_help() -> None:
    for short, helps in ((MODEL.kv_nbytes, True), (MODEL.kv_nbytes + 1, False)):
        budgets = [(10**7, FIXED + 2 * SLOT - short), (159_000 + 2 * SLOT - short, 0)]
        for ram, vram in budgets:
            with pytest.raises(OffloadError, match="are too little") as caught:
                make_plan(MODEL, MACHINE, ram, vram)
            assert ("shorter context" in (caught.value.hint or "")) is helps
