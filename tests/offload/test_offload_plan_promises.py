"""Promises that every plan for a graphics card keeps, whatever the model, machine and wishes."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload.errors import OffloadError
from offload.hardware import Machine
from offload.plan import MemoryPlan, ModelFootprint, make_plan


@st.composite
def footprints(draw: st.DrawFn) -> ModelFootprint:
    group = draw(st.sampled_from([32, 64, 128]))
    rows = group * draw(st.integers(1, 40))
    expert = rows * draw(st.integers(1, 2000))
    num_experts = draw(st.integers(1, 64))
    small = st.integers(0, 10**6)
    return ModelFootprint(
        dense_nbytes=draw(small),
        embedding_nbytes=draw(small),
        kv_nbytes=draw(small),
        workspace_nbytes=draw(small),
        num_moe_layers=draw(st.integers(1, 12)),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(8, num_experts))),
        expert_nbytes=expert,
        slot_nbytes=-(-expert // 4096) * 4096,
        intermediate_size=rows,
        group_size=group,
        device_workspace_nbytes=draw(st.none() | small),
        prefill_tokens=draw(st.integers(0, 600)),
        host_bias_nbytes=draw(st.just(0) | small),
    )


bandwidths = st.none() | st.floats(1e3, 1e12)
machines = st.builds(
    Machine,
    ram_bw=bandwidths,
    disk_bw=bandwidths,
    link_bw=bandwidths,
    zero_copy_bw=bandwidths,
    host_bw=bandwidths,
    vram_bw=bandwidths,
    context_nbytes=st.integers(0, 10**6),
)
placements = st.sampled_from(["auto", "lru", "slice", "pinned"])
lanes = st.sampled_from(["auto", "link", "cpu", "both"])
shares = st.floats(0, 1.2)


def check_promises(plan: MemoryPlan, model: ModelFootprint, machine: Machine) -> None:
    total, slot = model.total_experts, model.slot_nbytes
    assert 0 <= plan.vram_nbytes <= plan.vram_budget
    assert 0 <= plan.ram_nbytes <= plan.ram_budget
    embedding = model.embedding_nbytes
    workspace = model.workspace_nbytes
    if model.device_workspace_nbytes is not None:
        workspace = model.device_workspace_nbytes
    assert plan.vram_nbytes == (
        model.dense_nbytes
        + model.kv_nbytes
        + workspace
        + (machine.context_nbytes or 0)
        + (embedding if plan.embedding_on_device else 0)
        + plan.staging_slots * slot
        + plan.device_slots * slot
        + total * plan.slice_nbytes
    )
    assert plan.ram_nbytes == (
        (0 if plan.embedding_on_device else embedding)
        + model.host_bias_nbytes
        + (1 + plan.host_slots) * slot
    )
    assert model.experts_per_token <= plan.host_slots
    if plan.placement == "slice":
        assert plan.device_slots == 0
        assert 0 < plan.slice_size < model.intermediate_size
        assert plan.slice_size % model.group_size == 0
        assert plan.link_size % model.group_size == 0
        assert 0 <= plan.link_size <= model.intermediate_size - plan.slice_size
        row = model.expert_nbytes // model.intermediate_size
        assert plan.slice_nbytes % 4096 == 0
        assert 0 <= plan.slice_nbytes - plan.slice_size * row < 4096
    else:
        assert (plan.slice_size, plan.slice_nbytes, plan.link_size) == (0, 0, 0)
    assert (plan.staging_slots >= 2) is (plan.device_slots < total)
    assert plan.staging_slots <= max(2, 2 * model.num_experts)
    assert 0 <= plan.link_share <= 1
    assert (plan.lanes == ()) is (plan.device_slots == total)


def check_experts_have_a_place(plan: MemoryPlan, model: ModelFootprint) -> None:
    total = model.total_experts
    if plan.placement == "pinned":
        held = min(total, plan.host_slots + plan.device_slots)
    else:
        held = max(plan.host_slots, plan.device_slots)
    assert plan.resident_experts == held
    assert plan.disk_nbytes == (total - held) * model.expert_nbytes
    moved = plan.link_nbytes_per_token + plan.ram_nbytes_per_token
    missing = model.active_expert_nbytes * (1 - plan.device_resident_share)
    assert moved == pytest.approx(missing, abs=2)
    if "host" not in plan.lanes:
        assert plan.ram_nbytes_per_token == 0
    if "link" not in plan.lanes:
        assert plan.link_nbytes_per_token == 0


@settings(max_examples=400, deadline=None)
@given(footprints(), machines, placements, lanes, shares, shares)
def test_every_plan_keeps_its_promises(
    model: ModelFootprint,
    machine: Machine,
    placement: str,
    lane: str,
    ram_share: float,
    vram_share: float,
) -> None:
    assume((placement, lane) != ("lru", "cpu"))
    all_slots = model.total_experts * model.slot_nbytes
    fixed = model.embedding_nbytes + model.host_bias_nbytes
    ram = int(ram_share * (all_slots + fixed)) + 1
    vram = int(vram_share * (all_slots + model.on_device_nbytes)) + 1
    try:
        plan = make_plan(model, machine, ram, vram, placement=placement, lane=lane)
    except OffloadError as error:
        refused = error
        plan = None
    if plan is None:
        assert "too little" in refused.message
        assert refused.hint
        return
    check_promises(plan, model, machine)
    check_experts_have_a_place(plan, model)
    if placement != "auto" and plan.lanes:
        assert plan.placement == placement
    if lane != "auto" and plan.lanes:
        assert plan.lanes == {"link": ("link",), "cpu": ("host",), "both": ("link", "host")}[lane]
    assert make_plan(model, machine, ram, vram, placement=placement, lane=lane) == plan


@settings(max_examples=200, deadline=None)
@given(footprints(), machines, shares)
def test_no_other_placement_is_clearly_faster(
    model: ModelFootprint, machine: Machine, vram_share: float
) -> None:
    machine = replace(machine, **{n: getattr(machine, n) or 1e9 for n in ("vram_bw", "link_bw")})
    machine = replace(machine, disk_bw=machine.disk_bw or 1e8)
    fixed = model.embedding_nbytes + model.host_bias_nbytes
    ram = fixed + (model.total_experts + 1) * model.slot_nbytes
    needed = model.on_device_nbytes + (machine.context_nbytes or 0) + 2 * model.slot_nbytes
    vram = needed + int(vram_share * model.total_experts * model.slot_nbytes)
    plan = make_plan(model, machine, ram, vram)
    assert plan.predicted_tok_s is not None
    for placement in ("lru", "slice"):
        try:
            other = make_plan(model, machine, ram, vram, placement=placement)
        except OffloadError:
            continue
        assert other.predicted_tok_s is not None
        assert other.predicted_tok_s <= 1.1 * plan.predicted_tok_s * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(footprints(), machines, placements, st.integers(0, 10**8))
def test_the_budget_that_the_error_names_fits(
    model: ModelFootprint, machine: Machine, placement: str, more: int
) -> None:
    """So does any larger one, and the room that a plan leaves holds no more experts."""
    from moecli.units import parse_size

    fixed = model.embedding_nbytes + model.host_bias_nbytes
    ram = fixed + (model.total_experts + 1) * model.slot_nbytes
    with pytest.raises(OffloadError) as caught:
        make_plan(model, machine, ram, 1, placement=placement)
    named = (caught.value.hint or "").split("`--vram ")[1].split("`")[0]
    enough = parse_size(named, "").of(0)
    plan = make_plan(model, machine, ram, enough, placement=placement)
    with pytest.raises(OffloadError):
        make_plan(model, machine, ram, _least(model, machine, placement) - 1, placement=placement)
    spare = plan.vram_free
    if plan.device_slots < model.total_experts and plan.placement != "slice":
        assert spare < model.slot_nbytes, "one more expert would have fitted"
    if plan.placement == "slice":
        finer = plan.slice_size * 8 // 7 + model.group_size
        if finer < model.intermediate_size:
            assert spare < model.total_experts * model.slice_nbytes(finer)
    make_plan(model, machine, ram, enough + more, placement=placement)


def _least(model: ModelFootprint, machine: Machine, placement: str) -> int:
    """VRAM that must be there, whatever is kept where."""
    total, slot = model.total_experts, model.slot_nbytes
    slices = total * slot
    if model.intermediate_size > model.group_size:
        slices = total * model.slice_nbytes(model.group_size)
    experts = {"auto": 0, "pinned": 0, "lru": model.experts_per_token * slot, "slice": slices}
    fixed = model.on_device_nbytes + (machine.context_nbytes or 0)
    return fixed + min(total * slot, experts[placement] + 2 * slot)
