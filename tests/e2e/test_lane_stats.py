"""What a run on a device says of its lanes: who served how many experts, and what it moved."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moecli.config import SIMULATED, EngineConfig
from moecli.engine import Engine
from moecli.events import GenerationStats
from moecli.run_view import show_timings, stats_line
from tests.e2e.test_lanes import (
    ARMS,
    CHUNK,
    CTX,
    EVERYTHING,
    footprint_of,
    little_for,
    on_device,
    quantized_wide,
    vram_for,
)

__all__ = ["quantized_wide"]


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_only_lanes_that_are_used_serve_and_move(
    quantized_wide: Path, placement: str, lane: str
) -> None:
    stats = on_device(quantized_wide, little_for(placement), placement, lane).stats
    footprint = footprint_of(quantized_wide)
    a_token = footprint.num_moe_layers * footprint.experts_per_token
    over_link = stats.experts_fetched + stats.experts_linked
    assert stats.link_nbytes > 0, "a prompt's experts came over the link"
    if placement == "slice":
        assert stats.experts_sliced >= (stats.generated_tokens - 1) * a_token
        assert stats.experts_sliced % a_token == 0
        assert (over_link, stats.experts_hosted) == (0, 0)
        return
    assert stats.experts_sliced == 0
    assert (over_link > 0) == (lane != "cpu")
    assert (stats.experts_hosted > 0) <= (lane != "link")
    assert (stats.experts_fetched > 0) == (placement == "lru")
    served = over_link + stats.experts_hosted
    assert 0 < served <= stats.expert_misses, "what a lane serves is a miss"
    assert stats.link_nbytes >= over_link * footprint.expert_nbytes


def test_slices_over_the_link_move_their_rest(quantized_wide: Path) -> None:
    both = {
        lane: on_device(quantized_wide, little_for("slice"), "slice", lane).stats
        for lane in ("link", "cpu")
    }
    assert both["link"].experts_sliced == both["cpu"].experts_sliced
    moved = both["link"].link_nbytes - both["cpu"].link_nbytes
    share = moved / (both["link"].experts_sliced * footprint_of(quantized_wide).expert_nbytes)
    assert 0.2 < share < 0.8, "of each expert the rows that VRAM lacks, and no more"


@pytest.fixture
def device_engine(quantized_wide: Path) -> Iterator[tuple[Engine, list[tuple[int, int]]]]:
    heard: list[tuple[int, int]] = []
    config = EngineConfig(
        ctx=CTX,
        prefill_chunk=CHUNK,
        device=SIMULATED,
        kernels="torch",
        ram_nbytes=EVERYTHING,
        vram_nbytes=vram_for(quantized_wide, 0.5),
    )
    with Engine.open(quantized_wide, config, progress=lambda *n: heard.append(n)) as engine:
        yield engine, heard


def test_loading_says_how_far_it_is(device_engine: tuple[Engine, list[tuple[int, int]]]) -> None:
    engine, heard = device_engine
    assert heard
    assert all(0 < done <= total for done, total in heard)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (engine.plan.total_experts + engine.plan.device_slots,) * 2
    assert engine.plan.on_device


def test_numbers_of_a_device_are_shown(
    device_engine: tuple[Engine, list[tuple[int, int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    stats = GenerationStats(
        *(20, 0, 8, 0.5, 40.0, 20.0, 30, 10, 0, 300 << 20),
        experts_fetched=4,
        experts_linked=2,
        experts_hosted=1,
        link_nbytes=3 << 20,
        peak_vram_nbytes=5 << 30,
    )
    plan = device_engine[0].plan
    assert stats_line(stats, plan).endswith("peak memory 300 MiB and 5.0 GiB of VRAM")
    show_timings(stats, plan)
    shown = capsys.readouterr().err.splitlines()
    assert shown[3] == (
        "lanes    4 fetched, 2 read in place over the link, 1 computed by the processor, "
        "3.0 MiB over the link in all"
    )
