"""`moecli plan` of built-in specs: what it finds by which name, and the whole of what it tells."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moecli import known
from moecli.commands.plan import _measurable
from moecli.models.hf_outline import read_counted
from offload import bandwidth, hardware
from quant.scheme import QuantScheme
from tests.cli.fakes import write_model
from tests.commands import Command

GIB = 1 << 30
MACHINE = hardware.Machine(ram_total=64 * GIB, ram_available=60 * GIB, physical_cores=2)
DESKTOP = (
    *("--vram", "24GiB", "--ram", "64GiB", "--link", "25GB/s", "--ram-bw", "60GB/s"),
    *("--cpu-bw", "50GB/s", "--vram-bw", "1TB/s", "--disk", "7GB/s"),
)
LARGE = ("--vram", "400GiB", "--ram", "4TiB", *DESKTOP[4:])


QWEN_ON_12_GIB = """
model       Qwen3-30B-A3B, a built-in spec
parameters  30.5B, 3.4B active a token
scheme      int4-g32 in experts, int8-g128 elsewhere

                       VRAM      RAM       disk only  because
dense weights          1.2 GiB                        every token reads all
embedding                        594 MiB              one row a token
KV cache, 8192 tokens  768 MiB                        48 layers hold all
workspace              116 MiB                        a prompt's activations
CUDA itself            640 MiB                        context, libraries
experts on their way   648 MiB   2.5 MiB              prompts pass through
experts                8.7 GiB   15.2 GiB             RAM has all, VRAM some
free of the budget     533 KiB   48.2 GiB
budget                 12.0 GiB  64.0 GiB

placement         lru: slots that change by use
slots             3521 of 6144 experts have a place in VRAM, 6144 in RAM
what VRAM lacks   33% over the link, the rest by the processor
prompts' experts  pass through VRAM, 256 experts at a time
hits assumed      57.3%, as if experts were asked for alike
decode tok/s      at most 106.1, limited by RAM bandwidth
  link alone      50.8
  CPU alone       94.8
prefill tok/s     at most 1839, limited by link bandwidth

one more step                    decode tok/s  limited by
as planned                       106.1         RAM bandwidth
8 GiB more VRAM                  438.4         VRAM bandwidth
RAM and processor twice as fast  166.4         link and processor
experts in int8-g128             42.1          RAM bandwidth

cards that hold it all  weights   24 GB  48 GB  80 GB
bf16                    56.9 GiB  3      2      1
int8-g128               29.2 GiB  2      1      1
int4-g32                16.9 GiB  1      1      1

counted  one sequence of 8192 tokens; 90% of each card less 2 GiB; all but
         experts in 16 bits

vLLM  on 1 x 24 GB, int4-g32: documented by vLLM, not tried here
moecli quantize Qwen/Qwen3-30B-A3B -q int4-g32 --dense none
vllm serve ~/.local/share/moecli/models/Qwen3-30B-A3B-int4-g32 --tensor-parallel-size 1 --max-model-len 8192 --gpu-memory-utilization 0.9
"""  # noqa: E501


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the same one."""
    monkeypatch.setattr(hardware, "detect", lambda *_, **__: MACHINE)
    monkeypatch.setattr(bandwidth, "measure_ram", lambda threads: 60e9)
    monkeypatch.setattr(bandwidth, "measure_compute", lambda _: 50e9)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, real_cli: Command) -> Command:
    """Runs the command as if its output were a terminal without colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    for module in ("ui", "plan_view"):
        monkeypatch.setattr(f"moecli.{module}.is_terminal", lambda stream: stream is sys.stdout)
    return real_cli


def planned(real_cli: Command, *args: str | Path) -> dict[str, Any]:
    outcome = real_cli("plan", *args, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def piped(real_cli: Command, *args: str) -> dict[str, list[str]]:
    outcome = real_cli("plan", *args)
    assert (outcome.code, outcome.err) == (0, "")
    split = [line.split("\t") for line in outcome.out.splitlines()]
    return {label: values for label, *values in split}


@pytest.mark.parametrize("name", [spec.name for spec in known.SPECS])
def test_every_built_in_spec_is_planned(real_cli: Command, name: str) -> None:
    plan = planned(real_cli, name, *LARGE)
    spec = known.find(name)
    assert spec is not None
    counted = read_counted(spec.config())
    assert plan["model"] == name
    assert plan["num_params"] == counted.num_params
    assert plan["num_active_params"] == counted.num_active_params
    assert plan["kv_nbytes"] == counted.kv_nbytes(8192, 2)
    assert plan["predicted_tok_s"] > 0
    assert [holding["scheme"][:4] for holding in plan["holdings"]] == ["bf16", "int8", "int4"]
    assert plan["holdings"][0]["nbytes"] == 2 * counted.num_params
    sizes = [holding["nbytes"] for holding in plan["holdings"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", [spec.name for spec in known.SPECS])
def test_what_does_not_fit_names_the_longest_context_that_does(
    real_cli: Command, name: str
) -> None:
    spec = known.find(name)
    assert spec is not None
    most = str(read_counted(spec.config()).max_context)
    rates = ("--device", "cpu", *DESKTOP[6:10], *DESKTOP[12:])
    # A budget that holds what a short context needs and not what the longest does.
    needed = [planned(real_cli, name, *rates, "--ram", "8TiB", "-c", c) for c in ("64", most)]
    fixed = [plan["ram_nbytes"] - plan["host_arena_nbytes"] for plan in needed]
    least = needed[0]["slot_nbytes"] * 8
    budget = f"{(sum(fixed) // 2 + least) // 2**20}MiB"
    outcome = real_cli("plan", name, *rates, "--ram", budget, "-c", most)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {spec.label}, a built-in spec: ")
    largest = int(outcome.err.split("`--ctx ")[1].split("`")[0])
    assert 64 < largest < int(most)
    fits = [
        real_cli("plan", name, *rates, "--ram", budget, "-c", str(ctx)).code
        for ctx in (largest, largest + 1)
    ]
    assert fits == [0, 1]


def test_piped_it_tells_all_in_full(real_cli: Command) -> None:
    rows = piped(real_cli, "Llama-4-Scout", *DESKTOP, "-c", "32k")
    assert rows["model"] == ["llama4-scout"]
    assert rows["parameters"] == ["108641793536", "17172894720"]
    assert rows["scheme"] == ["int4-g32", "int8-g128"]
    assert rows["KV cache, 32768 tokens"][0] == str(32768 * 49152 + 36 * 8192 * 4096)
    assert rows["KV cache, 32768 tokens"][-1] == "36 of 48 hold 8192"
    assert rows["decode tok/s"] == rows["step: as planned"]
    assert rows["prefill tok/s"][1] == "link"
    assert rows["cards: bf16"][:2] == [str(2 * 108641793536), "16"]
    assert "remark" not in rows
    assert "figures" not in rows


def test_a_family_that_moecli_does_not_run_is_planned_and_says_so(real_cli: Command) -> None:
    for name, word in (("llama3.1-8b", "dense"), ("llama4-behemoth", "no weights")):
        assert word in planned(real_cli, name, *LARGE)["remark"]
    assert planned(real_cli, "scout", *DESKTOP)["remark"] is None


def test_what_a_card_cannot_do_yet_is_planned_and_said(real_cli: Command) -> None:
    remark = planned(real_cli, "scout", *DESKTOP, "--kv-dtype", "int8")["remark"]
    assert remark == "planned only: graphics cards do not read a KV cache in int8 yet"
    cpu = ("--device", "cpu", "--ram", "64GiB", *DESKTOP[6:])
    assert planned(real_cli, "scout", *cpu, "--kv-dtype", "int8")["remark"] is None


def test_a_dense_model_is_read_whole_in_every_step(real_cli: Command) -> None:
    """70B in 4 bits do not fit 24 GiB: what is missing there comes from RAM, always."""
    plan = planned(real_cli, "llama3.1-70b", *DESKTOP)
    assert plan["placement"] in ("pinned", "slice")
    experts = 80 * plan["expert_nbytes"]
    assert plan["expert_nbytes"] == 704_643_072 * 4.5 / 8
    read = plan["vram_nbytes_per_token"] + plan["ram_nbytes_per_token"]
    read += plan["link_nbytes_per_token"]
    assert read == pytest.approx(plan["dense_nbytes"] + experts, rel=1e-6)
    outcome = real_cli("plan", "llama3.1-70b", *DESKTOP, "--placement", "lru")
    assert outcome.code == 1
    assert "would never hit" in outcome.err


def test_what_is_guessed_is_said_wherever_it_is_shown(real_cli: Command) -> None:
    plan = planned(real_cli, "behemoth", *LARGE)
    assert plan["title"] == "Llama 4 Behemoth (announced figures), a built-in spec"
    assert "guessed" in plan["guessed"]
    assert "guessed" in piped(real_cli, "behemoth", *LARGE)["figures"][0]
    outcome = real_cli("plan", "behemoth", *DESKTOP)
    assert outcome.code == 1
    assert outcome.err.startswith("error: Llama 4 Behemoth (announced figures), a built-in spec: ")
    assert plan["vllm"] is None, "nobody can serve it"
    assert planned(real_cli, "scout", *LARGE)["guessed"] is None


def test_groups_are_narrowed_to_what_divides_the_rows(real_cli: Command) -> None:
    plan = planned(real_cli, "gpt-oss-20b", *DESKTOP, "-q", "int8")
    assert (plan["scheme"], plan["dense_scheme"]) == ("int8-g64", "int8-g64")
    assert plan["expert_nbytes"] >= 3 * 2880 * 2880 * 8.25 / 8
    outcome = real_cli("plan", "gpt-oss-20b", *DESKTOP, "-q", "int8-g128")
    assert outcome.code == 1
    assert "groups of 128" in outcome.err


def test_a_machine_without_a_card_says_so_with_no_vram(real_cli: Command) -> None:
    rates = ("--ram", "64GiB", "--ram-bw", "60GB/s", "--cpu-bw", "50GB/s", "--disk", "7GB/s")
    plan = planned(real_cli, "scout", *rates, "--vram", "0")
    assert (plan["on_device"], plan["vram_budget"]) == (False, 0)
    assert plan["predicted_tok_s"]


def test_names_that_come_close_are_offered(real_cli: Command) -> None:
    outcome = real_cli("plan", "lama4-scuot")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: no model is called `lama4-scuot`")
    assert "hint: did you mean `llama4-scout`" in outcome.err
    outcome = real_cli("plan", "./lama4-scout")
    assert "did you mean" not in outcome.err
    assert "llama4-scout, llama4-maverick" in " ".join(real_cli("plan", "-h").out.split())


def test_what_is_here_goes_before_what_is_built_in(
    real_cli: Command, home: Path, models: Path
) -> None:
    qwen = known.find("qwen3-30b-a3b")
    assert qwen is not None
    path = write_model(models / "scout")
    (path / "config.json").write_text(json.dumps(qwen.config()))
    assert planned(real_cli, "scout", *DESKTOP)["architecture"] == "Qwen3MoeForCausalLM"
    (home / "maverick").mkdir()
    (home / "maverick" / "config.json").write_text(json.dumps(qwen.config()))
    assert planned(real_cli, "maverick", *DESKTOP)["architecture"] == "Qwen3MoeForCausalLM"
    assert planned(real_cli, "llama4-scout", *DESKTOP)["model"] == "llama4-scout", "another name"


def test_a_spec_is_no_model_to_run(real_cli: Command) -> None:
    for command in (("run", "llama4-scout", "hi"), ("chat", "scout"), ("show", "scout")):
        outcome = real_cli(*command)
        assert outcome.code == 1
        assert "is a spec for `moecli plan`, without weights" in outcome.err
        assert "meta-llama/Llama-4-Scout-17B-16E-Instruct" in outcome.err
    assert "none were released" in real_cli("run", "behemoth", "hi").err


def test_a_hub_that_cannot_be_asked_is_no_reason_not_to_plan(
    real_cli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    outcome = real_cli("plan", "openai/gpt-oss-20b", *DESKTOP)
    assert outcome.code == 1
    assert "hint: `moecli plan gpt-oss-20b` needs no hub; or " in outcome.err
    assert "gpt-oss" not in real_cli("plan", "openai/other", *DESKTOP).err.split("hint")[1]


def test_a_prediction_that_lacks_a_bandwidth_says_which(
    screen: Command,
) -> None:
    flags = ("--vram", "24GiB", "--ram", "64GiB", "--vram-bw", "1TB/s", "--lane", "link")
    out = screen("plan", "llama4-maverick", *flags).out
    assert "\ndecode tok/s      unknown; say `--disk` and `--link`\n" in out
    assert "one more step" not in out


def test_bandwidth_is_no_limit_of_a_tiny_model(screen: Command) -> None:
    out = " ".join(screen("plan", "demo", "--vram", "1GiB", *DESKTOP[4:]).out.split())
    assert "decode tok/s over 1000: bandwidth does not limit so small a model" in out
    assert "prefill tok/s not predicted: the card's arithmetic decides" in out
    assert "one more step" not in out
    assert " moecli quantize demo -q int4-g32 --dense none vllm serve ~/" in out


def test_a_prompt_on_the_processor_is_as_fast_as_it_computes(real_cli: Command) -> None:
    """Weights by hand; the machine computes 50e9 of whatever it is asked."""
    flags = ("--device", "cpu", "--ram", "100GiB", *DESKTOP[6:8])
    rows = piped(real_cli, "scout", *flags)
    weights = 48 * (62_914_560 + 2 * 125_829_120)
    assert float(rows["prefill tok/s"][0]) == pytest.approx(50e9 / (2 * weights))
    assert rows["prefill tok/s"][1] == "cpu"


def test_on_a_terminal_it_is_readable_at_80_columns(screen: Command) -> None:
    outcome = screen("plan", "qwen3-30b-a3b", *DESKTOP, "--vram", "12GiB")
    assert (outcome.code, outcome.err) == (0, "")
    told = [line.rstrip() for line in outcome.out.splitlines()]
    assert told == QWEN_ON_12_GIB.strip("\n").splitlines()
    assert max(len(line) for line in told[:-1]) <= 80, "but for a command, to be copied"


def test_the_command_for_a_cluster_is_told_line_by_line(real_cli: Command) -> None:
    plan = planned(real_cli, "deepseek-v3", *LARGE[:4], *DESKTOP[4:], "--device", "cpu")
    assert plan["vllm"]["cards"].split(", ")[0].endswith(" GB")
    outcome = real_cli("plan", "qwen3-30b-a3b", *DESKTOP)
    told = [line.split("\t")[1] for line in outcome.out.splitlines() if line[:7] == "command"]
    assert told[0] == "moecli quantize Qwen/Qwen3-30B-A3B -q int4-g32 --dense none"
    assert told[1].startswith("vllm serve ~/.local/share/moecli/models/Qwen3-30B-A3B-int4-g32 ")


def test_an_expert_too_large_to_be_timed_is_timed_in_part() -> None:
    scheme = QuantScheme.parse("int4")
    for name, part in (("llama4-scout", False), ("llama3.1-405b", True)):
        spec = known.find(name)
        assert spec is not None
        counted = read_counted(spec.config())
        layout = _measurable(counted, scheme)
        assert (layout.intermediate_size < counted.expert_intermediate_size) is part
        assert layout.hidden_size == counted.hidden_size
        assert layout.nbytes <= 128 << 20


def test_documented_plans_are_current() -> None:
    """docs/planning.md is filled by tools/planning_doc.py, which says how."""
    from tools.planning_doc import PAGE, document

    page = PAGE.read_text(encoding="utf-8")
    assert page.count("$ moecli plan") == 4
    assert document(page) == page


def test_what_the_library_runs_is_planned_as_it_runs_there(real_cli: Command, home: Path) -> None:
    """On the processor, its cache in fp32; of a card it is said that none runs it."""
    config = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "num_experts": 8}
    config |= {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    (home / "small").mkdir()
    (home / "small" / "config.json").write_text(json.dumps(config))
    rates = DESKTOP[4:]
    outcome = real_cli("plan", "small", "--ram", "1GiB", *rates, "-c", "1024", "--json")
    assert outcome.code == 0, outcome.err
    here = json.loads(outcome.out)
    assert here["kv_nbytes"] == 2 * 1024 * 2 * 2 * 64 * 4
    assert here["remark"] is None
    assert not here["on_device"]
    card = planned(real_cli, "small", "--ram", "1GiB", "--vram", "2GiB", *rates, "-c", "1024")
    assert "transformers computes this architecture" in card["remark"]
    assert card["num_params"] == here["num_params"]
    assert card["holdings"] == here["holdings"]
    for own in ("gpt-oss-20b", "deepseek-v3"):
        assert planned(real_cli, own, *DESKTOP)["remark"] is None
