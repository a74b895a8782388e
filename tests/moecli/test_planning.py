"""From settings to the plan: when it is one for a card, and what else is proposed."""

from dataclasses import replace

import pytest

from moecli import known
from moecli.config import EngineConfig
from moecli.errors import MoecliError
from moecli.footprint import model_footprint, tensor_nbytes
from moecli.models.config import ModelSpec
from moecli.models.hf_outline import read_counted
from moecli.planning import Question, plan_model
from offload.errors import OffloadError
from offload.hardware import Machine
from quant.scheme import QuantScheme
from tests.e2e.tiny import llama4_config
from tests.models.released import DEEPSEEK_V3, GPT_OSS_20B

MIB = 1 << 20
SPEC = ModelSpec.from_hf(llama4_config() | {"vocab_size": 65_536})  # dense weights matter
SCHEMES = QuantScheme(4, 32), None
RAM = Machine(ram_available=100 * MIB)
CARD = replace(
    *(RAM,),
    **{"gpu_name": "RTX", "vram_total": 1 << 30, "vram_free": 1 << 30, "context_nbytes": 0},
)


def test_a_card_is_planned_for_where_there_is_one_and_the_settings_allow_it() -> None:
    assert plan_model(SPEC, SCHEMES, 64, EngineConfig(), CARD).on_device
    assert not plan_model(SPEC, SCHEMES, 64, EngineConfig(device="cpu"), CARD).on_device
    assert not plan_model(SPEC, SCHEMES, 64, EngineConfig(), RAM).on_device
    granted = plan_model(SPEC, SCHEMES, 64, EngineConfig(vram_nbytes=1 << 30), RAM)
    assert granted.vram_budget == 1 << 30


def test_wishes_arrive() -> None:
    config = EngineConfig(placement="pinned", lane="cpu", vram_nbytes=_needed())
    plan = plan_model(SPEC, SCHEMES, 64, config, CARD)
    assert (plan.placement, plan.lanes) == ("pinned", ("host",))
    nf4 = plan_model(SPEC, SCHEMES, 64, replace(config, dense_scheme="nf4"), CARD)
    assert nf4.dense_nbytes < plan.dense_nbytes


def test_a_cache_in_int8_takes_half_the_memory_where_the_processor_computes() -> None:
    plans = {
        name: plan_model(SPEC, SCHEMES, 256, EngineConfig(device="cpu", kv_dtype=name), CARD)
        for name in ("auto", "bf16", "int8")
    }
    assert plans["auto"] == plans["bf16"]
    size = SPEC.head_dim
    assert plans["int8"].kv_nbytes == plans["bf16"].kv_nbytes * (size + 2) // (2 * size)
    expanded = 2 * SPEC.num_kv_heads * size * 2 * 256  # one layer of it, in bf16, for a prompt
    assert plans["int8"].workspace_nbytes == plans["bf16"].workspace_nbytes + expanded
    with pytest.raises(MoecliError, match="KV cache in int8") as caught:
        plan_model(SPEC, SCHEMES, 256, EngineConfig(kv_dtype="int8"), CARD)
    assert "`--device cpu`" in (caught.value.hint or "")


def _needed() -> int:
    """VRAM without room for all experts."""
    plan = plan_model(SPEC, SCHEMES, 64, EngineConfig(), CARD)
    return plan.vram_nbytes - plan.embedding_nbytes - 2 * plan.slot_nbytes


def test_a_smaller_scheme_is_proposed_for_a_card_only() -> None:
    least = plan_model(SPEC, SCHEMES, 64, EngineConfig(), CARD).dense_nbytes
    with pytest.raises(OffloadError) as caught:
        plan_model(SPEC, SCHEMES, 64, EngineConfig(vram_nbytes=least), CARD)
    assert (caught.value.hint or "").startswith("`--dense-scheme nf4` fits; or ")
    config = EngineConfig(vram_nbytes=least, dense_scheme="nf4")
    assert plan_model(SPEC, SCHEMES, 64, config, CARD).on_device
    with pytest.raises(OffloadError) as caught:  # nothing helps
        plan_model(SPEC, SCHEMES, 64, EngineConfig(vram_nbytes=1), CARD)
    assert "nf4" not in (caught.value.hint or "")
    with pytest.raises(OffloadError) as caught:  # it is what did not fit
        plan_model(SPEC, SCHEMES, 64, replace(config, vram_nbytes=1), CARD)
    assert "nf4" not in (caught.value.hint or "")
    sizes = model_footprint(SPEC, *SCHEMES, 64, EngineConfig.prefill_chunk)
    short = sizes.fixed_nbytes + sizes.experts_per_token * sizes.slot_nbytes - 1
    with pytest.raises(OffloadError, match="of RAM are too little") as caught:
        plan_model(SPEC, SCHEMES, 64, EngineConfig(device="cpu", ram_nbytes=short), CARD)
    assert "nf4" not in (caught.value.hint or "")


LATENT = ModelSpec.from_hf(DEEPSEEK_V3 | {"num_hidden_layers": 4, "n_routed_experts": 16})


def test_latents_are_kept_in_16_bits_wherever_they_are() -> None:
    roomy = replace(RAM, ram_available=1 << 34)
    config = EngineConfig(vram_nbytes=1 << 33)
    plan = plan_model(LATENT, SCHEMES, 64, config, roomy)
    assert plan.on_device
    assert plan.kv_nbytes == 4 * 64 * 576 * 2
    config = EngineConfig(device="cpu", kv_dtype="int8")
    with pytest.raises(MoecliError, match=r"latents.*int8") as caught:
        plan_model(LATENT, SCHEMES, 64, config, roomy)
    assert "`--kv-dtype`" in (caught.value.hint or "")


def test_a_plan_counts_windows_and_biases_of_experts() -> None:
    """Of gpt-oss-20b on a card; the processor's lane has its own copy of the biases."""
    spec = ModelSpec.from_hf(GPT_OSS_20B)
    roomy = replace(RAM, ram_available=1 << 36)
    plan = plan_model(spec, SCHEMES, 4096, EngineConfig(vram_nbytes=8 << 30), roomy)
    token = 2 * spec.num_kv_heads * spec.head_dim * 2
    assert plan.kv_nbytes == 12 * (4096 + 2 * 128) * token, "windows are kept twice"
    biases = 24 * 32 * 3 * 2880 * 4
    assert plan.host_bias_nbytes == biases
    assert plan.ram_nbytes == (
        biases
        + (0 if plan.embedding_on_device else plan.embedding_nbytes)
        + (1 + plan.host_slots) * plan.slot_nbytes
    )
    unbiased = plan_model(
        replace(spec, expert_bias=False), SCHEMES, 4096, EngineConfig(vram_nbytes=8 << 30), roomy
    )
    assert plan.dense_nbytes - unbiased.dense_nbytes == biases
    assert unbiased.host_bias_nbytes == 0


def test_the_matrix_that_is_absorbed_is_planned_for_as_it_is_held() -> None:
    """In fp32 whatever it is stored in; all others as they are stored."""
    halves = 4 * LATENT.num_heads * (LATENT.latent.nope_size + LATENT.latent.value_size)
    numel = halves * LATENT.latent.rank
    for scheme, nbytes in ((None, 2 * numel), (QuantScheme(8, 128), numel + numel // 64)):
        found = model_footprint(LATENT, QuantScheme(4, 32), scheme, 64, 512)
        assert found.kv_nbytes == 4 * 64 * 576 * 2
        plain = [replace(tensor, expanded=False) for tensor in LATENT.dense_tensors]
        stored = sum(tensor_nbytes(tensor, scheme) for tensor in plain)
        assert found.dense_nbytes + found.embedding_nbytes == stored - nbytes + 4 * numel


def test_without_pictures_a_model_that_sees_keeps_that_room_for_experts() -> None:
    known_scout = known.find("llama4-scout")
    assert known_scout is not None
    scout = read_counted(known_scout.config())
    machine = Machine(ram_available=80 << 30)
    sees = Question(scout, SCHEMES, 8192, EngineConfig(ram_nbytes=40 << 30), machine).answer()
    config = EngineConfig(ram_nbytes=40 << 30, pictures=False)
    text = Question(scout, SCHEMES, 8192, config, machine).answer()
    spared = sees.workspace_nbytes - text.workspace_nbytes
    assert spared > 400 << 20
    assert text.host_slots - sees.host_slots == pytest.approx(spared / text.slot_nbytes, abs=1)
    assert max(sees.ram_nbytes, text.ram_nbytes) <= 40 << 30
