"""What runs ask for is kept, and decides what VRAM begins with."""

from pathlib import Path

import pytest

from moecli.config import SIMULATED, EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.events import Finished, GenerationStats
from offload.usage import ExpertUsage
from tests.e2e.conftest import Command
from tests.e2e.test_lanes import CHUNK, CTX, EVERYTHING, quantized_wide, vram_for

__all__ = ["quantized_wide"]

GREEDY = SamplingConfig(temperature=0, max_tokens=24)


def run(
    path: Path, usage_file: Path | None, notes: list[str] | None = None, **config: object
) -> tuple[GenerationStats, list[int], set[tuple[int, int]]]:
    """Numbers and tokens of an answer, and which experts VRAM began with."""
    settings = EngineConfig(ctx=CTX, prefill_chunk=CHUNK, kernels="torch", **config)  # type: ignore[arg-type]
    notify = (notes if notes is not None else []).append
    with Engine.open(path, settings, notify, usage_file=usage_file) as engine:
        tiers = getattr(engine._parts, "tiers", None)
        resident = set(tiers.residents()) if tiers else set()
        session = engine.new_session()
        tokens = engine.encode_chat([{"role": "user", "content": "a fox?"}])
        *_, last = engine.generate(session, tokens, GREEDY)
        assert isinstance(last, Finished)
        return last.stats, list(session.tokens), resident


def counts(path: Path, usage_file: Path) -> ExpertUsage:
    with Engine.open(path, EngineConfig(ctx=CTX)) as engine:
        kept = ExpertUsage(engine.spec.moe_layers, engine.spec.num_experts)
    kept.add_file(usage_file)
    return kept


def test_a_run_on_the_processor_is_counted_request_by_request(
    quantized_wide: Path, tmp_path: Path
) -> None:
    file = tmp_path / "usage.json"
    stats, _, _ = run(quantized_wide, file)
    kept = counts(quantized_wide, file)
    assert kept.num_requests == stats.expert_hits + stats.expert_misses
    run(quantized_wide, file)
    assert counts(quantized_wide, file).num_requests == 2 * kept.num_requests


@pytest.mark.parametrize("placement", ["pinned", "lru"])
def test_a_run_on_a_device_is_counted_like_one_on_the_processor(
    quantized_wide: Path, tmp_path: Path, placement: str
) -> None:
    device = {"device": SIMULATED, "placement": placement, "lane": "link"}
    device |= {"ram_nbytes": EVERYTHING, "vram_nbytes": vram_for(quantized_wide, 0.5)}
    run(quantized_wide, tmp_path / "processor.json")
    run(quantized_wide, tmp_path / "device.json", **device)
    there = counts(quantized_wide, tmp_path / "processor.json").counts
    here = counts(quantized_wide, tmp_path / "device.json").counts
    # A token that ends an answer costs the device one step more, and capturing tries a step.
    for layer, row in there.items():
        more = [b - a for a, b in zip(row, here[layer], strict=True)]
        assert all(count >= 0 for count in more)
        assert sum(more) <= 2


@pytest.mark.parametrize("placement", ["pinned", "lru"])
def test_vram_begins_with_favourites_and_the_answer_is_the_same(
    quantized_wide: Path, tmp_path: Path, placement: str
) -> None:
    device = {
        "device": SIMULATED,
        "placement": placement,
        "lane": "link",
        "ram_nbytes": EVERYTHING,
        "vram_nbytes": vram_for(quantized_wide, 0.5),
    }
    file = tmp_path / "usage.json"
    without, tokens, _ = run(quantized_wide, None, **device)
    assert run(quantized_wide, file)[1] == tokens
    wanted = counts(quantized_wide, file).favourites()
    helped, same, resident = run(quantized_wide, file, **device)
    assert same == tokens
    assert 0 < len(resident) < len(wanted)
    assert resident == set(wanted[: len(resident)])
    assert helped.expert_hits > without.expert_hits or placement == "lru"


def test_damaged_file_is_said_aloud_and_the_run_goes_on(
    quantized_wide: Path, tmp_path: Path
) -> None:
    file = tmp_path / "usage.json"
    file.write_text("{")
    notes: list[str] = []
    tokens = run(quantized_wide, None)[1]
    assert run(quantized_wide, file, notes)[1] == tokens
    assert "does not count the experts of this model" in notes[0]


def test_the_command_keeps_counts_with_the_state_of_the_user(
    moecli: Command, quantized_wide: Path, home: Path
) -> None:
    for _ in range(2):
        assert moecli("run", quantized_wide, "hi", "--raw", "-n", "2", "--ctx", "64").code == 0
    found = list(home.rglob("usage/*.json"))
    assert len(found) == 1
    assert counts(quantized_wide, found[0]).num_requests > 0
