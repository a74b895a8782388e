"""Bytes that decoding reads, and the rate that bandwidths allow for them."""

from dataclasses import replace

import pytest

from moecli.roofline import Traffic, allowed_tok_s, decode_traffic
from offload.hardware import Machine
from offload.plan import MemoryPlan, ModelFootprint, make_plan
from offload.stats import CacheStats

MIB = 1 << 20
FOOTPRINT = ModelFootprint(
    dense_nbytes=8 * MIB,
    embedding_nbytes=MIB,
    kv_nbytes=MIB,
    workspace_nbytes=MIB,
    num_moe_layers=4,
    num_experts=16,
    experts_per_token=2,
    expert_nbytes=MIB,
    slot_nbytes=MIB,
    intermediate_size=1024,
    group_size=32,
)
MACHINE = Machine(
    ram_available=1 << 30, ram_bw=60e9, disk_bw=3e9, link_bw=20e9, zero_copy_bw=25e9, vram_bw=900e9
)


def plan(vram: int = 0, placement: str = "auto", lane: str = "auto") -> MemoryPlan:
    machine = replace(MACHINE, context_nbytes=0, host_bw=30e9)
    return make_plan(FOOTPRINT, machine, 512 * MIB, vram, placement=placement, lane=lane)


def test_the_processor_reads_dense_weights_and_what_was_asked_for() -> None:
    counted = CacheStats(hits=70, misses=10, disk_nbytes=10 * MIB)
    assert decode_traffic(plan(), counted, 10, 10) == Traffic(16.0 * MIB, 0, 0, MIB)


def test_sequences_that_decode_together_share_dense_weights_and_experts() -> None:
    """Four sequences, ten steps, of which each asked for twelve experts in all."""
    found = decode_traffic(plan(), CacheStats(hits=120), 10, 40)
    assert found == Traffic((8 * 10 + 120) / 40 * MIB, 0, 0, 0)


def test_a_device_reads_slots_link_and_leaves_the_rest_to_the_processor() -> None:
    counted = CacheStats(
        hits=40, misses=40, fetched=20, linked=8, hosted=12, device_nbytes=28 * MIB
    )
    found = decode_traffic(plan(64 * MIB, "lru", "both"), counted, 10, 10)
    assert (found.ram, found.vram) == (pytest.approx(1.2 * MIB), pytest.approx((8 + 6) * MIB))
    assert (found.link, found.disk, found.moved) == (pytest.approx(2.8 * MIB), 0, found.link)


def test_of_slices_the_plan_says_what_a_token_reads() -> None:
    sliced = plan(40 * MIB, "slice", "both")
    assert sliced.slice_size > 0
    found = decode_traffic(sliced, CacheStats(sliced=80, disk_nbytes=5), 10, 10)
    assert found.vram == sliced.vram_nbytes_per_token
    assert found.link == sliced.link_nbytes_per_token
    assert found.ram == sliced.ram_nbytes_per_token
    assert found.disk == 0.5


def test_the_slowest_memory_decides() -> None:
    traffic = Traffic(ram=6e9, vram=90e9, link=0, disk=0)
    assert allowed_tok_s(traffic, MACHINE) == pytest.approx(10)
    assert allowed_tok_s(replace(traffic, link=5e9), MACHINE) == pytest.approx(5)
    assert allowed_tok_s(replace(traffic, disk=3e9), MACHINE) == pytest.approx(1)
    slower = replace(MACHINE, zero_copy_bw=None)
    assert allowed_tok_s(replace(traffic, link=5e9), slower) == pytest.approx(4)


def test_an_unknown_bandwidth_matters_only_where_bytes_take_it() -> None:
    unknown = replace(MACHINE, disk_bw=None)
    assert allowed_tok_s(Traffic(6e9, 0, 0, 0), unknown) == pytest.approx(10)
    assert allowed_tok_s(Traffic(6e9, 0, 0, 1), unknown) is None
