"""quantize, list, show, rm: the store, and the whole of what they print."""

import json
from pathlib import Path

import pytest

from moecli import store
from moecli.errors import MoecliError
from tests.cli.fakes import write_model
from tests.e2e import tiny


@pytest.fixture
def source(home: Path) -> Path:
    """A checkpoint as far as these commands look at it: rows of 128 and 256 weights."""
    path = home / "Llama"
    path.mkdir()
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 4}
    config = tiny.qwen3_config() | sizes | {"num_key_value_heads": 2, "head_dim": 32}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_quantize_into_the_store(cli, source, home) -> None:
    outcome = cli("quantize", source)
    out = home / ".local/share/moecli/models/Llama-int4-g32"
    assert outcome.code == 0
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert lines[:2] == [
        "quantizing: 10%, error 8.00%, 18 s left",
        "quantizing: 20%, error 8.00%, 16 s left",
    ]
    assert [line for line in lines if line.startswith("quantizing:")] == lines[:10], "no more"
    assert lines[10:] == [
        f"written        {out}",
        "size           30.0 MiB, from 100 MiB",
        "bits a weight  5.25 (4.50 in experts)",
        "error          7.89% in experts, 0.61% elsewhere",
        "time           12 s",
        "",
        "next: moecli chat Llama-int4-g32",
    ]
    assert store.is_model(out)


@pytest.mark.parametrize(
    ("flags", "name", "dense"),
    [
        (("-q", "int8"), "Llama-int8-g128", "int8-g128"),
        (("-q", "int8", "--group-size", "64"), "Llama-int8-g64", "int8-g128"),
        (("-q", "int4-g128", "--dense", "none"), "Llama-int4-g128", None),
        (("--dense", "int4"), "Llama-int4-g32", "int4-g32"),
    ],
)
def test_schemes(cli, source, models, flags, name, dense) -> None:
    assert cli("quantize", source, *flags).code == 0
    assert json.loads((models / name / "moecli.json").read_text())["dense_scheme"] == dense


def test_quantize_elsewhere_and_as_json(cli, source, home) -> None:
    outcome = cli("quantize", source, "-o", home / "out", "--json")
    assert json.loads(outcome.out)["bpw"] == 5.25
    assert json.loads(outcome.out)["out"] == str(home / "out")
    assert f"next: moecli chat {home / 'out'}" in outcome.err
    assert store.is_model(home / "out")


def test_quantize_stopped_says_that_it_can_go_on(cli, source, models, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_INTERRUPT", "1")
    outcome = cli("quantize", source)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == (
        "stopped; finished work is kept, and the same command goes on from there"
    )
    listing = cli("list")
    assert listing.out == ""
    assert "unfinished: `Llama-int4-g32`" in listing.err
    refused = cli("run", "Llama-int4-g32", "hi")
    assert refused.err.startswith("error: `Llama-int4-g32` is not finished\n")
    monkeypatch.delenv("FAKE_INTERRUPT")
    assert cli("quantize", source).code == 0
    assert cli("list").err == ""


def test_quantize_does_not_overwrite(cli, source) -> None:
    cli("quantize", source)
    outcome = cli("quantize", source)
    assert outcome.code == 1
    assert "exists already" in outcome.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("-q", "int5"), "`int5`"),
        (("--group-size", "48"), "48"),
        (("--dense", "fp8"), "`fp8`"),
        (("-q", "int4-g32", "--group-size", "64"), "contradict"),
    ],
)
def test_schemes_that_do_not_exist(cli, source, flags, word) -> None:
    outcome = cli("quantize", source, *flags)
    assert outcome.code == 1
    assert word in outcome.err
    assert "\nhint: " in outcome.err


def test_a_repository_of_the_hub_is_not_run_unasked(cli, models) -> None:
    for command in (("run", "Qwen/Qwen3-30B-A3B", "hi"), ("chat", "Qwen/Qwen3-30B-A3B")):
        outcome = cli(*command)
        assert outcome.code == 1
        assert outcome.err == (
            "error: `Qwen/Qwen3-30B-A3B` is not quantized yet\n"
            "\nhint: `moecli quantize Qwen/Qwen3-30B-A3B` does it while it downloads; "
            "`moecli plan Qwen/Qwen3-30B-A3B` says before whether it fits\n"
        )
    write_model(models / "Qwen3-30B-A3B-int4-g32")
    outcome = cli("run", "Qwen/Qwen3-30B-A3B", "hi")
    assert outcome.err.endswith("hint: quantized, it is called `Qwen3-30B-A3B-int4-g32` here\n")


def test_demo_is_quantized_once(cli, models) -> None:
    first = cli("run", "demo", "hi")
    assert first.out == "you said: hi\n"
    assert first.err.startswith("quantizing the embedded model to int4, once\n")
    assert store.is_model(models / "demo-int4-g32")
    assert cli("run", "demo", "hi").err == ""
    assert cli("quantize", "demo").code == 1, "it is there"


def test_list_piped_is_tab_separated_in_full(cli, models) -> None:
    first = write_model(models / "a-int4-g32")
    second = write_model(models / "b c", "int8-g128")
    (models / "not-a-model").mkdir()
    lines = [line.split("\t") for line in cli("list").out.splitlines()]
    assert [line[:2] for line in lines] == [["a-int4-g32", "int4-g32"], ["b c", "int8-g128"]]
    assert [line[4] for line in lines] == [str(first), str(second)]
    assert int(lines[0][2]) == sum(file.stat().st_size for file in first.iterdir())
    assert cli("ls").out == cli("list").out


def test_list_json(cli, model) -> None:
    (entry,) = json.loads(cli("list", "--json").out)
    assert entry["name"] == model
    assert set(entry) == {"name", "path", "scheme", "nbytes", "modified"}


def test_list_of_nothing_says_what_to_do(cli, home) -> None:
    outcome = cli("list")
    assert (outcome.code, outcome.out) == (0, "")
    assert "`moecli quantize demo`" in outcome.err
    assert cli("list", "--json").out == "[]\n"
    assert not (home / ".local").exists(), "looking changes nothing"


def test_models_move_with_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert store.models_dir() == tmp_path / "data/moecli/models"
    monkeypatch.setenv("MOECLI_HOME", str(tmp_path / "moecli"))
    assert store.models_dir() == tmp_path / "moecli/models"


def test_rm_needs_yes_without_a_terminal(cli, models, model) -> None:
    outcome = cli("rm", model)
    assert outcome.code == 1
    assert f"`moecli rm -y {model}`" in outcome.err
    assert store.is_model(models / model)
    outcome = cli("rm", "-y", model)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith(f"deleted `{model}`, ")
    assert list(models.iterdir()) == []


def test_rm_deletes_only_in_the_store(cli, home, models, model) -> None:
    elsewhere = write_model(home / "elsewhere")
    for name in (elsewhere, "elsewhere", f"{models}/../models/{model}/..", "..", "."):
        outcome = cli("rm", "-y", name)
        assert outcome.code == 1, name
        assert "internal" not in outcome.err, name
    assert store.is_model(elsewhere)
    assert store.is_model(models / model)


def test_rm_drops_what_is_unfinished(cli, models) -> None:
    write_model(models / "a.partial")
    assert cli("rm", "-y", "a.partial").code == 0
    assert list(models.iterdir()) == []


def test_rm_of_a_link_leaves_its_target(cli, home, models) -> None:
    target = write_model(home / "elsewhere")
    (models / "link").symlink_to(target)
    assert cli("rm", "-y", "link").code == 0
    assert store.is_model(target)
    assert list(models.iterdir()) == []


def test_rm_killed_halfway_leaves_no_broken_model(cli, models, model, monkeypatch) -> None:
    def killed(path: Path) -> None:
        (path / "moecli.json").rename(path / "gone")
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    assert cli("rm", "-y", model).code == 130
    monkeypatch.undo()
    monkeypatch.setenv("MOECLI_HOME", str(models.parent))
    assert store.models() == []
    assert store.unfinished() == []
    write_model(models / "next")
    store.remove(models / "next")
    assert list(models.iterdir()) == [], "the next one sweeps up"


def test_names_are_never_paths_into_the_store(models, model) -> None:
    with pytest.raises(MoecliError):
        store.resolve(f"x/../{model}")
    assert store.resolve(model) == models / model


def test_an_existing_directory_goes_before_a_name(home, models, model) -> None:
    (home / model).mkdir()
    assert store.resolve(model) == Path(model)
    (home / "demo").mkdir()
    assert store.resolve("demo") == models / "demo-int4-g32", "`demo` is ours, `./demo` is not"
    assert store.resolve("./demo") == Path("demo")


def test_file_is_no_model(home) -> None:
    (home / "weights.gguf").write_text("")
    with pytest.raises(MoecliError, match="is a file"):
        store.resolve("weights.gguf")


def test_damaged_manifest_is_told(cli, models, model) -> None:
    (models / model / "moecli.json").write_text("{")
    outcome = cli("list")
    assert outcome.code == 1
    assert "moecli.json` is damaged" in outcome.err
