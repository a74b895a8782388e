"""show, plan and doctor with the real packages below them; no weights are needed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moecli import selfcheck, store
from moecli.commands import doctor
from moecli.commands import plan as plan_command
from offload import bandwidth, hardware, measured
from offload.pinning import SimulatedPinner
from quant import ops
from quant.kernels.cpu.library import BUILD_HINT, NoLibrary
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
    monkeypatch.setattr(bandwidth, "measure_compute", lambda _: 55e9)
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
        "decoder\tmoecli\n"
        "vision\t0\n"
        "scheme\tnone: as trained\n"
        f"size\t{(scout / 'config.json').stat().st_size}\n"
        f"path\t{scout}\n"
    )


def test_show_of_a_checkpoint_that_bitsandbytes_has_quantized(real_cli, scout) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantization["bnb_4bit_quant_type"] = "nf4"
    config = {**SCOUT, "quantization_config": quantization}
    (scout / "config.json").write_text(json.dumps(config))
    shown = dict(line.split("\t") for line in real_cli("show", scout).out.splitlines())
    assert shown["scheme"] == "bitsandbytes nf4, not by moecli"
    assert not json.loads(real_cli("show", scout, "--json").out)["quantized_here"]


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
    (home / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    outcome = real_cli(command, home)
    assert outcome.code == 1
    assert "`GPT2LMHeadModel`" in outcome.err


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
    plan = json.loads(real_cli("plan", scout, *flags, "--cpu-bw", "10GB/s", "--json").out)
    assert plan["bottleneck"] == "cpu"
    seconds = plan["dense_nbytes"] / 50e9 + active / 10e9 + missing / 5e9
    assert plan["predicted_tok_s"] == pytest.approx(1 / seconds)


def test_the_first_example_of_the_help_page_fits(real_cli) -> None:
    example = plan_command.EXAMPLES.strip().splitlines()[0].split()
    assert example[:3] == ["moecli", "plan", "demo"]
    assert real_cli(*example[1:]).code == 0


def test_plan_piped_has_full_values(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, "--ram", "100GiB")
    assert (outcome.code, outcome.err) == (0, "")
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in outcome.out.splitlines()}
    assert lines["experts"] == [str(768 * 70_778_880), "0", "all are in memory"]
    assert lines["KV cache, 8192 tokens"] == [str(8192 * 4096 * 48), "0", "48 layers hold all"]
    assert lines["budget"][0] == str(100 * GIB)
    assert lines["slots"] == ["768", "768"]
    assert lines["decode tok/s"][1] == "ram", "more is read of dense weights than of experts"


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


CARD = ("--vram", "24GiB", "--ram", "64GiB", "--link", "25GB/s", "--ram-bw", "60GB/s")
RATES = ("--cpu-bw", "50GB/s", "--vram-bw", "1TB/s", "--disk", "7GB/s")


def test_plan_of_scout_on_a_card_that_is_not_here(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, *CARD, *RATES, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    plan = json.loads(outcome.out)
    assert plan["vram_nbytes"] <= plan["vram_budget"] == 24 * GIB
    assert plan["ram_nbytes"] <= plan["ram_budget"] == 64 * GIB
    assert (plan["placement"], plan["lanes"]) == ("slice", ["link", "host"])
    size, row = plan["slice_size"], 70_778_880 // 8192
    assert size % 256 == 0
    pages = -(-size * row // 4096) * 4096
    assert plan["device_pool_nbytes"] == 768 * pages
    assert plan["host_slots"] == 768
    active, rest = 48 * 70_778_880, (8192 - size) / 8192
    vram_s = (plan["dense_nbytes"] + active * (1 - rest)) / 1e12
    assert plan["predicted_tok_s"] == pytest.approx(1 / (vram_s + active * rest / 60e9))
    assert plan["link_tok_s"] == pytest.approx(1 / (vram_s + active * rest / 25e9))
    assert plan["host_tok_s"] == pytest.approx(1 / (vram_s + active * rest / 50e9))


def test_plan_on_a_card_piped(real_cli, scout) -> None:
    def rows(*flags: str) -> dict[str, list[str]]:
        outcome = real_cli("plan", scout, *CARD, *RATES, *flags)
        assert (outcome.code, outcome.err) == (0, "")
        split = [line.split("\t") for line in outcome.out.splitlines()]
        return {label: values for label, *values in split}

    found = rows("--placement", "lru", "--lane", "link")
    assert found["placement"] == ["lru"]
    slots = int(found["slots"][0])
    assert found["slots"] == [str(slots), "768", "768"]
    staging = int(found["prompts' experts"][0])
    assert found["experts on their way"] == [
        str(staging * 70_778_880),
        "70778880",
        "0",
        "prompts pass through",
    ]
    in_vram = [str(slots * 70_778_880), str(768 * 70_778_880), "0", "RAM has all, VRAM some"]
    assert found["experts"] == in_vram
    assert found["CUDA itself"] == [str(640 << 20), "0", "0", "context, libraries"]
    labels = list(found)[list(found).index("dense weights") : list(found).index("budget")]
    in_vram = [int(found[label][0]) for label in labels]
    assert sum(in_vram) == 24 * GIB == int(found["budget"][0])
    assert found["what VRAM lacks"] == ["link", "1.0"]
    assert found["decode tok/s"][1] == "link"
    assert float(found["prefill tok/s"][0]) > float(found["decode tok/s"][0])
    found = rows()
    assert found["rows"] == ["1536", "8192", "768", "768"]
    share = float(found["what VRAM lacks"][1])
    assert found["what VRAM lacks"][0] == "link host"
    assert share == pytest.approx(25 / 75, abs=0.02)


def test_plan_says_what_it_takes_for_granted(real_cli, scout) -> None:
    outcome = real_cli("plan", scout, "--vram", "24GiB", "--ram", "64GiB", "--cpu-bw", "1GB/s")
    assert outcome.err == (
        "note: how fast RAM reaches a graphics card is unknown; say it with `--link`\n"
        "note: VRAM is taken to be read at 300.0 GB/s; `--vram-bw` says better\n"
    )
    assert "decode tok/s\t\t\n" in outcome.out


def test_plan_on_a_card_that_is_too_small_says_what_fits(real_cli, scout) -> None:
    flags = (*CARD[2:], *RATES)
    outcome = real_cli("plan", scout, "--vram", "8GiB", *flags)
    assert (outcome.code, outcome.out) == (1, "")
    hint = outcome.err.split("\n\nhint: ")[1]
    assert hint.startswith("`--dense-scheme nf4` fits; or give `--vram 11.")
    for advice in (("--vram", "8GiB", "--dense-scheme", "nf4"), ("--vram", hint.split("`")[3][7:])):
        assert real_cli("plan", scout, *flags, *advice).code == 0
    outcome = real_cli("plan", scout, "--vram", "4GiB", *flags)
    assert "nf4" not in outcome.err
    assert "shorter context" not in outcome.err, "none is short enough"
    outcome = real_cli("plan", scout, "--vram", "16GiB", "--ctx", "1m", *flags)
    largest = outcome.err.split("`--ctx ")[1].split("`")[0]
    assert real_cli("plan", scout, "--vram", "16GiB", "--ctx", largest, *flags).code == 0


def test_plan_for_the_card_that_is_here(real_cli, scout, monkeypatch) -> None:
    card = replace(
        MACHINE, gpu_name="RTX", gpu_driver="600.1", vram_total=24 * GIB, vram_free=20 * GIB
    )
    monkeypatch.setattr(hardware, "detect", lambda *_, gpu, **__: card if gpu else MACHINE)
    for name in ("link", "zero_copy", "vram"):
        monkeypatch.setattr(bandwidth, f"measure_{name}", lambda: 25e9)
    monkeypatch.setattr(bandwidth, "measure_compute", lambda _: 1e9)
    outcome = real_cli("plan", scout, "--ram", "64GiB", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    plan = json.loads(outcome.out)
    assert plan["vram_budget"] == 20 * GIB - (512 << 20), "others keep theirs"
    assert plan["link_tok_s"] > plan["host_tok_s"]
    stated = ("--link", "5GB/s", "--ram", "64GiB")
    described = json.loads(real_cli("plan", scout, *stated, "--json").out)
    slower = 1 / described["link_tok_s"] - 1 / plan["link_tok_s"]
    missing = 48 * 70_778_880 * (1 - plan["device_resident_share"])
    assert slower == pytest.approx(missing / 5e9 - missing / 25e9), "what was measured gives way"
    without = json.loads(real_cli("plan", scout, "--json", "--device", "cpu").out)
    assert (without["vram_budget"], without["lanes"]) == (0, [])


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


@pytest.fixture
def card(monkeypatch) -> list[bool]:
    """A graphics card whose graph path is wrong; notes each time whether it was to be refreshed."""
    seen: list[bool] = []
    machine = replace(MACHINE, gpu_name="Test GPU", vram_total=24 * GIB, vram_free=20 * GIB)
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: machine)

    def check(refresh, begin):
        seen.append(refresh)
        if refresh:
            begin()
        errors = {"graph": "Mismatch: step 3: off by 2\nmore"}
        cases = [selfcheck.Result(p, f"case {p}", errors.get(p), 0.1) for p in selfcheck.PATHS]
        return selfcheck.SelfCheck({}, tuple(cases), remembered=not refresh)

    monkeypatch.setattr(selfcheck, "self_check", check)
    monkeypatch.setattr(measured, "CudaPinner", lambda device: SimulatedPinner())
    return seen


def test_doctor_shows_the_fast_paths_of_a_card(real_cli, card) -> None:
    outcome = real_cli("doctor")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line for line in outcome.out.splitlines() if " GPU " in line or "graphics" in line]
    assert lines == [
        "ok    graphics      Test GPU, 24.0 GiB, 20.0 GiB free",
        "ok    GPU kernels   1 cases right, compared earlier",
        "warn  GPU graph     off: `case graph` failed: Mismatch: step 3: off by 2",
        "ok    GPU fetch     1 cases right, compared earlier",
        "ok    GPU doorbell  1 cases right, compared earlier",
        "ok    GPU parts     1 cases right, compared earlier",
    ]
    assert "fix: until `moecli doctor --refresh` finds it right, each kernel" in outcome.out
    assert "ok    pinned RAM    30.0 GiB tried, and allowed" in outcome.out.splitlines()
    assert card == [False]


def test_doctor_checks_a_card_again(real_cli, card) -> None:
    outcome = real_cli("doctor", "--refresh")
    assert "comparing kernels" in outcome.err
    assert "ok    GPU kernels   1 cases right, compared now" in outcome.out.splitlines()
    assert card == [True]


def test_doctor_names_every_path() -> None:
    assert tuple(doctor._PATHS) == selfcheck.PATHS


def test_doctor_measures_once_and_again_when_asked_to(real_cli, models, monkeypatch) -> None:
    card = replace(
        MACHINE, gpu_name="RTX", gpu_driver="600.1", vram_total=24 * GIB, vram_free=20 * GIB
    )
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: card)
    for name in ("link", "vram"):
        monkeypatch.setattr(bandwidth, f"measure_{name}", lambda: 25e9)
    monkeypatch.setattr(bandwidth, "measure_zero_copy", lambda: None)
    monkeypatch.setattr(measured, "CudaPinner", lambda device: SimulatedPinner(20 * GIB))
    whole = selfcheck.SelfCheck({}, (selfcheck.Result("kernels", "a case", None, 0.1),))
    monkeypatch.setattr(selfcheck, "self_check", lambda *_, **__: whole)
    lines = real_cli("doctor").out.splitlines()
    assert "ok    graphics      RTX, 24.0 GiB, 20.0 GiB free, driver 600.1" in lines
    assert "ok    link speed    25.0 GB/s" in lines
    assert "warn  zero copy     not measured" in lines
    assert "warn  pinned RAM    20.0 GiB at most" in lines
    monkeypatch.setattr(bandwidth, "measure_link", lambda: 30e9)
    slower = bandwidth.DiskBandwidth(3e9, True, 1 << 20)
    monkeypatch.setattr(bandwidth, "measure_disk", lambda path: slower)
    assert real_cli("doctor").out.splitlines() == lines, "what was measured is kept"
    again = real_cli("doctor", "--refresh").out.splitlines()
    assert "ok    link speed    30.0 GB/s" in again
    assert "ok    disk speed    3.0 GB/s" in again
    kept = measured.with_bandwidths(card, disk=models)
    assert kept.disk_bw == 3e9
    assert measured.with_bandwidths(card).link_bw == 30e9, "and others reckon with it"


def test_doctor_says_that_others_were_busy(real_cli, models, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: replace(MACHINE, ram_bw=None))
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: 9e9)
    monkeypatch.setattr(measured, "beside_others", lambda find: (find(), 2.0))
    outcome = real_cli("doctor")
    assert outcome.code == 0
    assert "warn  RAM speed     9.0 GB/s at least" in outcome.out.splitlines()
    assert "`moecli doctor --refresh` once they are not" in outcome.out
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: 8e9)
    assert "warn  RAM speed     9.0 GB/s at least" in real_cli("doctor").out.splitlines()
    monkeypatch.setattr(measured, "beside_others", lambda find: (find(), 0.0))
    assert "ok    RAM speed     9.0 GB/s" in real_cli("doctor").out.splitlines()


def test_doctor_says_how_to_get_compiled_kernels(real_cli, monkeypatch) -> None:
    def missing() -> str:
        raise NoLibrary("the kernels for the processor are not compiled", BUILD_HINT)

    monkeypatch.setattr(ops, "cpu_isa", lambda: "avx9")
    assert "ok    CPU kernels   compiled, avx9 is used" in real_cli("doctor").out.splitlines()
    monkeypatch.setattr(ops, "cpu_isa", missing)
    said = " ".join(real_cli("doctor").out.split())
    assert "warn CPU kernels the kernels for the processor are not compiled" in said
    assert "python -m quant.kernels.cpu.build" in said


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
