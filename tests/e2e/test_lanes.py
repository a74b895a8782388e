"""On a device too, the answer does not depend on where experts lie or which lane computes them.

The device is simulated: main memory instead of VRAM, the same tables, lanes and decode loop.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moecli import opening_device
from moecli.config import SIMULATED, EngineConfig, SamplingConfig
from moecli.device import DeviceParts, DeviceSettings
from moecli.engine import Engine
from moecli.events import Finished, GenerationStats
from moecli.footprint import model_footprint
from moecli.models.config import ModelSpec
from moecli.selfcheck import FastPaths
from offload.hardware import Machine
from offload.manager import ExpertManager
from offload.pinning import SimulatedPinner
from offload.plan import CONTEXT_ASSUMED, ModelFootprint
from quant.checkpoint import QuantizedCheckpoint
from tests.e2e import tiny
from tests.e2e.conftest import quantize, saved_family
from tests.graphs import SimulatedGraph

CTX, CHUNK = 160, 24
PROMPT = "Tell me a story about a fox, please. "
GREEDY = SamplingConfig(temperature=0, max_tokens=24)
SHORT = SamplingConfig(temperature=0, max_tokens=10)
EVERYTHING = 1 << 40
ARMS = [
    *(("lru", "link"), ("lru", "both"), ("pinned", "link"), ("pinned", "cpu"), ("pinned", "both")),
    *(("slice", "link"), ("slice", "cpu"), ("slice", "both")),
]


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    stats: GenerationStats


def footprint_of(path: Path) -> ModelFootprint:
    checkpoint = QuantizedCheckpoint.open(path)
    spec = ModelSpec.from_hf(dict(checkpoint.config))
    return model_footprint(spec, checkpoint.scheme, checkpoint.dense_scheme, CTX, CHUNK)


def vram_for(path: Path, share: float) -> int:
    """Bytes of VRAM that hold about `share` of the experts, staging included."""
    footprint = footprint_of(path)
    slots = max(4 + footprint.experts_per_token, int(share * footprint.total_experts))
    room = slots * footprint.slot_nbytes
    return footprint.on_device_nbytes + CONTEXT_ASSUMED + room


def host_fixed(footprint: ModelFootprint) -> int:
    """Bytes of main memory besides experts."""
    return footprint.embedding_nbytes + footprint.host_bias_nbytes


def keep_all_bits(patch: pytest.MonkeyPatch) -> None:
    """Rounded to bf16, last bits of keys and values would turn a draw in a hundred around."""
    for module in ("engine", "opening_device"):
        patch.setattr(f"moecli.{module}.KV_DTYPE", torch.float32)


def little_for(placement: str) -> float:
    """A share of VRAM that is little, but enough: of every expert one group of rows at least."""
    return 0.7 if placement == "slice" else 0.3


def answer(
    path: Path, sampling: SamplingConfig = GREEDY, prompt: str = PROMPT, **config: object
) -> Answer:
    wishes = EngineConfig(ctx=CTX, prefill_chunk=CHUNK, **config)  # type: ignore[arg-type]
    with Engine.open(path, wishes) as engine:
        session = engine.new_session()
        tokens = engine.encode_chat([{"role": "user", "content": prompt}])
        last = None
        for event in engine.generate(session, tokens, sampling):
            last = event
        engine.check_integrity(deep=True)
        assert isinstance(last, Finished)
        return Answer(list(session.tokens), last.stats)


def on_device(
    path: Path,
    share: float,
    placement: str,
    lane: str,
    sampling: SamplingConfig = GREEDY,
    prompt: str = PROMPT,
    **config: object,
) -> Answer:
    if (
        placement == "slice"
        and footprint_of(path).intermediate_size == footprint_of(path).group_size
    ):
        pytest.skip("experts of one group of rows cannot be sliced")
    options = {"kernels": "torch", "vram_nbytes": vram_for(path, share), **config}
    options.setdefault("ram_nbytes", EVERYTHING)
    return answer(
        path, sampling, prompt, device=SIMULATED, placement=placement, lane=lane, **options
    )


def simulated_capture(step: Callable[[], None]) -> Callable[[], None]:
    step()
    graph = SimulatedGraph()
    with graph.capture():
        step()
    return graph.replay


@pytest.fixture(scope="session")
def quantized_wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized Llama 4 whose experts are wide enough to be sliced."""
    root = tmp_path_factory.mktemp("wide")
    config = {**tiny.llama4_config(), "intermediate_size": 96}
    source = tiny.write_checkpoint(root / "source", config, tiny.llama4_tensors(inner=96))
    return quantize(source, root / "quantized", 32)


@pytest.fixture(scope="session")
def quantized_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts with biases and a gate of their own, wide enough to be sliced; windows and sinks."""
    root = tmp_path_factory.mktemp("gpt-oss")
    changes = {"intermediate_size": 96, "num_hidden_layers": 2}
    return quantize(saved_family(root / "source", "gpt_oss", **changes), root / "quantized", 32)


@pytest.fixture(scope="session")
def quantized_deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention over latents, grouped routing, a first layer without experts."""
    root = tmp_path_factory.mktemp("deepseek")
    changes = {"moe_intermediate_size": 96, "num_hidden_layers": 2}
    return quantize(saved_family(root / "source", "deepseek_v3", **changes), root / "quantized", 32)


@pytest.fixture(scope="session", params=["gpt_oss", "deepseek"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"quantized_{request.param}")


@pytest.fixture(scope="session")
def family_expected(family: Path) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        keep_all_bits(patch)
        return answer(family, SHORT, kernels="torch")


@pytest.fixture(scope="session", params=["wide", "qwen3"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"quantized_{request.param}")


@pytest.fixture(scope="session")
def expected(model: Path) -> Answer:
    return answer(model, kernels="torch")


@pytest.fixture(scope="session")
def expected_wide(quantized_wide: Path) -> Answer:
    return answer(quantized_wide, kernels="torch")


@pytest.fixture(scope="session")
def demo_expected(quantized_demo: Path) -> Answer:
    return answer(quantized_demo, SHORT, kernels="torch")


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_greedy_output_is_the_same_in_every_placement_and_lane(
    model: Path, expected: Answer, placement: str, lane: str
) -> None:
    for share in (little_for(placement), 0.8):
        assert on_device(model, share, placement, lane).tokens == expected.tokens, share


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_the_same_with_biases_sinks_and_latents(
    family: Path,
    family_expected: Answer,
    placement: str,
    lane: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a step captured once; also where RAM holds a third of the experts, the rest on disk."""
    keep_all_bits(monkeypatch)
    monkeypatch.setattr("moecli.opening_device.eager", simulated_capture)
    footprint = footprint_of(family)
    some = max(footprint.experts_per_token, footprint.total_experts // 3)
    scarce = host_fixed(footprint) + (some + 1) * footprint.slot_nbytes
    for ram in (EVERYTHING, scarce):
        found = on_device(family, 0.7, placement, lane, SHORT, ram_nbytes=ram)
        assert found.tokens == family_expected.tokens, ram


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_the_same_on_the_embedded_model(
    quantized_demo: Path, demo_expected: Answer, placement: str, lane: str
) -> None:
    share = little_for(placement)
    assert on_device(quantized_demo, share, placement, lane, SHORT).tokens == demo_expected.tokens


def test_a_prompt_s_experts_are_copied_ahead(
    quantized_wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a layer computes, what the next one will probably choose is sent for; one token's not.

    Whether a copy then comes in time is the machine's affair.
    """
    guessed: list[tuple[int, bool]] = []
    prefetch = ExpertManager.prefetch

    def noted(
        self: ExpertManager, layer: int, experts: Sequence[int], to_device: bool = False
    ) -> None:
        guessed.append((layer, to_device))
        prefetch(self, layer, experts, to_device)

    monkeypatch.setattr(ExpertManager, "prefetch", noted)
    found = on_device(quantized_wide, 0.6, "pinned", "link", SHORT)
    chunks = -(-found.stats.prompt_tokens // CHUNK)
    long_ones = found.stats.prompt_tokens // CHUNK
    assert guessed
    assert {layer for layer, _ in guessed} == set(range(1, tiny.LAYERS))
    assert all(to_device for _, to_device in guessed)
    assert long_ones <= len(guessed) / (tiny.LAYERS - 1) <= chunks


@pytest.mark.parametrize(("share", "parts"), [(0.7, True), (0.9, True), (0.7, False)])
def test_a_prompt_s_slices_are_not_copied_again(
    quantized_wide: Path,
    expected_wide: Answer,
    share: float,
    parts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of experts this small a copy in pieces would not pay: here it is done all the same.

    Where the self-check has found that parts are not copied right, whole experts are.
    """
    settings = functools.partial(DeviceSettings, paths=FastPaths(parts=parts))
    monkeypatch.setattr("moecli.opening_device.DeviceSettings", settings)
    monkeypatch.setattr("offload.pieces.RUN_GAP_NBYTES", 1)
    monkeypatch.setattr("offload.pieces.GAP_NBYTES", 1)
    wishes = EngineConfig(
        ctx=CTX,
        prefill_chunk=CHUNK,
        device=SIMULATED,
        kernels="torch",
        vram_nbytes=vram_for(quantized_wide, share),
        ram_nbytes=EVERYTHING,
        placement="slice",
        lane="link",
    )
    with Engine.open(quantized_wide, wishes) as engine:
        session = engine.new_session()
        tokens = engine.encode_chat([{"role": "user", "content": PROMPT}])
        for _ in engine.generate(session, tokens, GREEDY):
            pass
        engine.check_integrity(deep=True)
        assert isinstance(engine._parts, DeviceParts)
        plan, stats = engine.plan, engine._parts.tiers.manager.stats  # without the lanes' own
        assert list(session.tokens) == expected_wide.tokens
    copies = stats.misses + stats.copied_ahead
    assert copies >= plan.total_experts // 2
    absent = plan.intermediate_size - plan.slice_size
    assert 0 < absent < plan.intermediate_size
    a_row = plan.expert_nbytes // plan.intermediate_size
    assert stats.device_nbytes == copies * (absent * a_row if parts else plan.expert_nbytes)


@pytest.mark.parametrize("captured_once", [False, True])
def test_experts_come_to_vram_beside_a_processor_that_serves_every_miss(
    quantized_wide: Path,
    expected_wide: Answer,
    captured_once: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One choice a token, and a processor three times as fast as the link."""
    plain = opening_device.device_machine

    def rated(*arguments: Any) -> Machine:
        return replace(plain(*arguments), link_bw=1e9, host_bw=3e9, vram_bw=1e12, ram_bw=1e11)

    monkeypatch.setattr("moecli.engine.device_machine", rated)
    if captured_once:
        monkeypatch.setattr("moecli.opening_device.eager", simulated_capture)
    arrived: list[int] = []
    check = DeviceParts.check_integrity

    def noted(self: DeviceParts, deep: bool = False) -> None:
        check(self, deep)
        assert self.tiers.cache is not None
        arrived.append(self.tiers.cache.num_arrived)

    monkeypatch.setattr(DeviceParts, "check_integrity", noted)
    found = on_device(quantized_wide, 0.5, "lru", "both")
    assert found.tokens == expected_wide.tokens
    assert arrived[-1] > 0


def test_the_same_with_all_experts_in_vram(model: Path, expected: Answer) -> None:
    found = on_device(model, 2.0, "auto", "auto")
    assert found.tokens == expected.tokens
    assert found.stats.expert_misses == 0


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_the_same_when_experts_come_from_disk(
    model: Path, expected: Answer, placement: str, lane: str
) -> None:
    footprint = footprint_of(model)
    slots = footprint.total_experts // 3
    ram = footprint.embedding_nbytes + (slots + 1) * footprint.slot_nbytes
    found = on_device(model, little_for(placement), placement, lane, ram_nbytes=ram)
    assert found.tokens == expected.tokens
    assert found.stats.expert_nbytes_read > footprint.experts_nbytes // 3


@pytest.mark.parametrize(("placement", "lane"), ARMS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_same_when_the_system_refuses_to_pin(
    model: Path,
    expected: Answer,
    placement: str,
    lane: str,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    footprint = footprint_of(model)
    limit = int(share * footprint.total_experts) * footprint.slot_nbytes + (1 << 21)
    monkeypatch.setattr("moecli.opening_device.SimulatedPinner", lambda: SimulatedPinner(limit))
    assert on_device(model, little_for(placement), placement, lane).tokens == expected.tokens


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arm=st.sampled_from(ARMS),
    share=st.floats(0.3, 1.0),
    ram_slots=st.integers(2, 20),
    pinned=st.one_of(st.none(), st.floats(0, 1)),
    in_pieces=st.booleans(),
    length=st.integers(2, 40),
)
def test_the_same_in_whatever_memory_there_is(
    quantized_wide: Path,
    expected_wide: Answer,
    arm: tuple[str, str],
    share: float,
    ram_slots: int,
    pinned: float | None,
    in_pieces: bool,
    length: int,
) -> None:
    """Random budgets, of which the system pins a part, and copies in pieces or whole."""
    footprint = footprint_of(quantized_wide)
    ram = footprint.embedding_nbytes + (ram_slots + 1) * footprint.slot_nbytes
    sampling = SamplingConfig(temperature=0, max_tokens=length)
    with pytest.MonkeyPatch.context() as patch:
        if in_pieces:
            patch.setattr("offload.pieces.RUN_GAP_NBYTES", 1)
            patch.setattr("offload.pieces.GAP_NBYTES", 1)
        if pinned is not None:
            limit = int(pinned * footprint.experts_nbytes) + (1 << 21)
            pinner = SimulatedPinner
            patch.setattr("moecli.opening_device.SimulatedPinner", lambda: pinner(limit))
        share = max(share, little_for(arm[0]))
        found = on_device(quantized_wide, share, *arm, sampling, ram_nbytes=ram)
    same = min(len(found.tokens), len(expected_wide.tokens))
    assert same > found.stats.prompt_tokens
    assert found.tokens[:same] == expected_wide.tokens[:same]


def test_the_same_draws_as_on_the_processor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_all_bits(monkeypatch)
    for top_p in (1.0, 0.9):
        sampling = SamplingConfig(temperature=0.8, top_p=top_p, seed=3, max_tokens=20)
        there = answer(model, sampling, kernels="torch")
        here = answer(
            model,
            sampling,
            kernels="torch",
            device=SIMULATED,
            vram_nbytes=vram_for(model, 0.4),
            ram_nbytes=EVERYTHING,
        )
        assert here.tokens == there.tokens


@pytest.mark.parametrize(("placement", "lane"), ARMS)
def test_a_step_captured_once_is_right_for_every_token(
    model: Path,
    expected: Answer,
    placement: str,
    lane: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of a step depends on the host: recorded once, it decodes across chunk borders."""
    monkeypatch.setattr("moecli.opening_device.eager", simulated_capture)
    assert on_device(model, little_for(placement), placement, lane).tokens == expected.tokens


@pytest.mark.parametrize(("placement", "lane"), [("lru", "link"), ("slice", "link")])
def test_the_same_with_the_kernels_of_a_card(
    quantized_wide: Path, placement: str, lane: str
) -> None:
    """Triton's kernels, interpreted, from the prompt to the last token.

    Without the host lane: the interpreter serves one thread at a time.
    """
    pytest.importorskip("triton")
    sampling = SamplingConfig(temperature=0, max_tokens=2)  # interpreted: 10 s each and more
    share, prompt = little_for(placement), "Hi"
    plain, found = (
        on_device(quantized_wide, share, placement, lane, sampling, prompt, kernels=kernels).tokens
        for kernels in ("reference", "triton")
    )
    assert found == plain
