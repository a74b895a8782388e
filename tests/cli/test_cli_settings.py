"""Which value of a setting counts: flag, environment, config file, the model's own, built in."""

from pathlib import Path

import pytest

from moecli.config import SamplingConfig
from moecli.errors import MoecliError
from moecli.settings import Settings, config_file, read_config_file
from moecli.units import Size
from tests.cli.fakes import FakeEngine


def write(home: Path, text: str) -> Path:
    path = home / ".config/moecli/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_each_source_gives_way_to_the_one_before(cli, home, model, monkeypatch) -> None:
    def temperature(*flags: str) -> float:
        outcome = cli("run", model, "hi", *flags)
        assert outcome.code == 0, outcome
        return FakeEngine.opened[-1].calls[-1][1].temperature

    assert temperature() == SamplingConfig().temperature
    monkeypatch.setattr(FakeEngine, "generation_config", {"temperature": 0.4})
    assert temperature() == 0.4
    write(home, "temp = 0.3")
    assert temperature() == 0.3
    monkeypatch.setenv("MOECLI_TEMP", "0.2")
    assert temperature() == 0.2
    assert temperature("--temp", "0.1") == 0.1
    assert temperature("--temp", "0") == 0


def test_config_file_holds_every_kind_of_setting(home) -> None:
    write(home, 'ctx = "32k"\nram = "24GiB"\ntop-k = 40\nstop = ["a", "b"]\nsystem = "Be brief."')
    settings = Settings.read(top_k=None)
    assert settings.engine_config().ctx == 32768
    assert settings.engine_config().ram_nbytes == 24 << 30
    assert settings.sampling_config({}).top_k == 40
    assert settings.sampling_config({}).stop == ("a", "b")
    assert settings.system == "Be brief."


def test_a_config_file_places_experts(home) -> None:
    write(home, "vram = '8GiB'\ndevice = 'cuda'\nplacement = 'pinned'\nlane = 'cpu'")
    config = Settings.read(lane="both").engine_config()
    assert (config.vram_nbytes, config.device) == (8 << 30, "cuda")
    assert (config.placement, config.lane, config.dense_scheme) == ("pinned", "both", "stored")
    write(home, "vram = '80%'")
    assert Settings.read(device="cpu").engine_config().vram_nbytes is None, "no card is asked for"


def test_config_home_moves(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    assert config_file() == tmp_path / "elsewhere/moecli/config.toml"
    assert read_config_file(config_file()) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top_p = 0.9", ["`top_p`", "`top-p`"]),
        ("colour = 'red'", ["`colour`", "known:"]),
        ("temp = true", ["`temp`"]),
        ("temp = 'warm'", ["`temp`", "warm"]),
        ("ctx = 'long'", ["`ctx`", "long"]),
        ("stop = 'x'", ["`stop`", "list"]),
        ("kernels = 'fast'", ["`kernels`", "`reference`", "`triton`"]),
        ("dense-scheme = 'int4'", ["`dense-scheme`", "`stored`, `nf4`, `llm-int8`"]),
        ("placement = 'best'", ["`placement`", "`auto`, `lru`, `slice`, `pinned`"]),
        ("temp = ", ["TOML"]),
    ],
)
def test_config_file_that_is_wrong(cli, home, model, text, words) -> None:
    path = write(home, text)
    outcome = cli("run", model, "hi")
    assert outcome.code == 1
    assert outcome.out == ""
    for word in [*words, str(path)]:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"do_sample": False}, SamplingConfig(temperature=0)),
        ({"do_sample": False, "temperature": 0.6}, SamplingConfig(temperature=0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            SamplingConfig(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1),
        ),
        ({"temperature": None, "max_length": 20}, SamplingConfig()),
    ],
)
def test_the_models_own_defaults(theirs, expected) -> None:
    assert Settings({}, {}).sampling_config(theirs) == expected


def test_share_of_ram_is_of_what_is_available(monkeypatch) -> None:
    from offload import hardware

    machine = hardware.Machine(ram_total=1000, ram_available=500)
    monkeypatch.setattr(hardware, "detect", lambda **_: machine)
    assert Settings({"ram": "50%"}, {}).engine_config().ram_nbytes == 250


def test_unknown_machine_needs_a_size(monkeypatch) -> None:
    from offload import hardware

    monkeypatch.setattr(hardware, "detect", lambda **_: hardware.Machine())
    with pytest.raises(MoecliError, match="RAM"):
        Settings({"ram": "50%"}, {}).engine_config()


@pytest.mark.parametrize(
    "flags",
    [
        ("--ctx", "long"),
        ("--ram", "24"),
        ("--top-k", "1.5"),
        ("--temp", "nan"),
        ("--kernels", "x"),
        ("--device", "tpu"),
        ("--placement", "random"),
        ("--lane", "bus"),
        ("--dense-scheme", "int4"),
        ("--kv-dtype", "fp8"),
        ("-n", "0"),
    ],
)
def test_flags_that_cannot_be_read_are_usage_errors(cli, model, flags) -> None:
    outcome = cli("run", model, "hi", *flags)
    assert outcome.code == 2
    assert flags[1] in outcome.err


@pytest.mark.parametrize("flags", [("--temp", "-1"), ("--top-p", "0"), ("--min-p", "2")])
def test_flags_out_of_range(cli, model, flags) -> None:
    outcome = cli("run", model, "hi", *flags)
    assert outcome.code == 1
    assert f"`{flags[0]}`" in outcome.err
    assert not FakeEngine.opened, "a wrong flag is told before the model is opened"


@pytest.mark.parametrize("none", ["0", "0GiB", "0%", "0 MB"])
def test_no_vram_means_no_card(none) -> None:
    config = Settings({"vram": none}, {}).engine_config()
    assert (config.device, config.vram_nbytes) == ("cpu", None)
    assert Settings({}, {"vram": Size(nbytes=0)}).engine_config() == config
    with pytest.raises(MoecliError, match="contradict") as caught:
        Settings({"vram": none, "device": "cuda"}, {}).engine_config()
    assert caught.value.exit_code == 2
    with pytest.raises(MoecliError, match="is no size"):
        Settings({"ram": none}, {})
