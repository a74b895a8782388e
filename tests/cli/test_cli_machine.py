"""show, plan and doctor with the real packages below them; no weights are needed."""

import json
from pathlib import Path

import pytest

from moecli import store
from moecli.commands import doctor
from offload import bandwidth, hardware
from tests.cli.fakes import write_model

GIB = 1 << 30
SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "rope_theta": 500000.0,
        "max_position_embeddings": 10485760,
        "vocab_size": 202048,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
}


MACHINE = hardware.Machine(
    ram_total=64 * GIB,
    ram_available=60 * GIB,
    cpu_name="Test CPU",
    physical_cores=8,
    isa=("avx2",),
    disk_free=500 * GIB,
)


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> None:
    """Always the same one."""
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: MACHINE)
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: 60e9)
    monkeypatch.setattr(
        bandwidth, "measure_disk", lambda path: bandwidth.DiskBandwidth(7e9, True, 1 << 20)
    )


@pytest.fixture
def scout(home: Path) -> Path:
    path = home / "Scout"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SCOUT))
    return path


def test_show_of_an_unquantized_checkpoint(real_cli, scout) -> None:
    outcome = real_cli("show", scout)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        "model\tScout\n"
        "architecture\tLlama4ForConditionalGeneration\n"
        "parameters\t107769861120\n"
        "active\t17172894720\n"
        "layers\t48, 48 of them with experts\n"
        "experts\t16 a layer, 1 a token and a shared one\n"
        "context\t10485760\n"
        "scheme\tnone: as trained\n"
        f"size\t{(scout / 'config.json').stat().st_size}\n"
        f"path\t{scout}\n"
    )


def test_show_json_of_a_model_of_the_store(real_cli, models) -> None:
    path = write_model(models / "scout-int4-g32")
    (path / "config.json").write_text(json.dumps(SCOUT))
    summary = json.loads(real_cli("show", "scout-int4-g32", "--json").out)
    assert (summary["scheme"], summary["dense_scheme"]) == ("int4-g32", "int8-g128")
    assert (summary["num_experts"], summary["experts_per_token"]) == (16, 1)
    assert summary["nbytes"] == store.disk_nbytes(path)


@pytest.mark.parametrize("command", ["show", "plan"])
def test_directory_that_is_no_model(real_cli, home, command) -> None:
    outcome = real_cli(command, home)
    assert outcome.code == 1
    assert "has no `config.json`" in outcome.err
    (home / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    outcome = real_cli(command, home)
    assert outcome.code == 1
    assert "`LlamaForCausalLM`" in outcome.err


def test_plan_of_scout(real_cli, scout) -> None:
    """Against figures done by hand: an expert is 70.8 MB at 4.5 bits, KV 2.6 GiB at 32k."""
    flags = ("--ram", "48GiB", "--ctx", "32k", "--ram-bw", "50GB/s", "--disk", "5GB/s")
    plan = json.loads(real_cli("plan", scout, *flags, "--json").out)
    assert plan["ctx"] == 32768
    assert plan["kv_nbytes"] == 32768 * 49152 + 36 * 8192 * 4096
    assert plan["slot_nbytes"] == 70_778_880
    assert plan["embedding_nbytes"] == 2 * 1_034_485_760
    assert plan["ram_nbytes"] <= plan["ram_budget"] == 48 * GIB
    assert plan["host_slots"] == (
        (48 * GIB - plan["ram_nbytes"]) // 70_778_880 + plan["host_slots"]
    ), "one more would not fit"
    active = 48 * 70_778_880
    missing = active * (768 - plan["host_slots"]) / 768
    seconds = (plan["dense_nbytes"] + active) / 50e9 + missing / 5e9
    assert plan["predicted_tok_s"] == pytest.approx(1 / seconds)


def test_plan_piped_has_full_values(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, "--ram", "100GiB")
    assert (outcome.code, outcome.err) == (0, "")
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in outcome.out.splitlines()}
    assert lines["experts"] == [str(768 * 70_778_880), "0"]
    assert lines["KV cache, 8192 tokens"] == [str(8192 * 4096 * 48), "0"]
    assert lines["budget"][0] == str(100 * GIB)
    assert lines["slots"] == ["768", "768"]
    assert lines["decode tok/s"][1] == "ram"


def test_plan_with_the_scheme_that_is_asked_for(real_cli, scout) -> None:
    plan = json.loads(real_cli("plan", scout, "-q", "int8", "--json").out)
    assert plan["slot_nbytes"] == 125_829_120 * 8.125 / 8


def test_plan_that_does_not_fit_names_the_context_that_does(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, "--ram", "14GiB", "--ctx", "1m")
    assert (outcome.code, outcome.out) == (1, "")
    message, hint = outcome.err.split("\n\n")
    assert message.startswith("error: ")
    largest = int(hint.split("`--ctx ")[1].split("`")[0])
    assert 1024 < largest < 1 << 20
    assert real_cli("plan", scout, "--ram", "14GiB", "--ctx", str(largest)).code == 0
    assert real_cli("plan", scout, "--ram", "14GiB", "--ctx", str(largest + 1024)).code == 1


def test_plan_that_never_fits(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, "--ram", "1GiB")
    assert outcome.code == 1
    assert "need" in outcome.err
    assert "--ram" in outcome.err


def test_doctor(real_cli, models, model) -> None:
    outcome = real_cli("doctor")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}
    assert f"ok    models        1 in {models}" in lines
    assert "ok    RAM           64.0 GiB, 60.0 GiB available" in lines
    assert "ok    RAM speed     60.0 GB/s" in lines
    assert "ok    disk speed    7.0 GB/s" in lines
    checks = json.loads(real_cli("doctor", "--json").out)
    assert len(checks) == len(lines)
    assert set(checks[0]) == {"status", "what", "found", "fix"}


def test_doctor_finds_what_is_wrong(real_cli, home, monkeypatch) -> None:
    path = home / ".config/moecli/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("colour = 1")
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: hardware.Machine(ram_available=GIB))
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such",))
    outcome = real_cli("doctor")
    assert outcome.code == 1
    status = {line[6:18].strip(): line[:5].strip() for line in outcome.out.splitlines()}
    assert status["settings"] == status["no-such"] == "error"
    assert status["RAM"] == status["disk"] == status["processor"] == "warn"
    assert "fix: " in outcome.out
