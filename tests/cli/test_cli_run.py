"""`moecli run`: what is read, and the whole of what is printed."""

import json

import pytest

from offload import hardware
from tests.cli.fakes import FakeEngine


def context(call: int = -1) -> str:
    """What the engine was given."""
    return FakeEngine.opened[-1].calls[call][0]


def test_only_the_answer_on_stdout(cli, model) -> None:
    outcome = cli("run", model, "hello")
    assert (outcome.code, outcome.out, outcome.err) == (0, "you said: hello\n", "")
    assert FakeEngine.opened[-1].closed


def test_model_text_is_printed_as_it_is(cli, model) -> None:
    assert cli("run", model, "signs").out == "é 漢 👍🏽 [/INST] [bold]x[/bold]\n"
    assert cli("run", model, "lines").out == "one\ntwo\n", "no second line break"
    assert cli("run", model, "nothing").out == ""


def test_prompt_is_joined_from_stdin_flag_and_argument(cli, model) -> None:
    cli("run", model, "third", "-p", "second", stdin="fïrst\n".encode())
    assert context() == "<user>fïrst\n\nsecond\n\nthird\n<assistant>"


def test_model_by_flag_leaves_the_argument_to_the_prompt(cli, model) -> None:
    assert cli("run", "-m", model, "hello").out == "you said: hello\n"


def test_model_by_environment(cli, model, monkeypatch) -> None:
    monkeypatch.setenv("MOECLI_MODEL", model)
    assert cli("run", "-p", "hello").out == "you said: hello\n"
    outcome = cli("run", "other", "hello")
    assert "`other`" in outcome.err, "an argument goes before the environment"


def test_model_given_twice(cli, model) -> None:
    outcome = cli("run", "-m", model, model, "hello")
    assert outcome.code == 2
    assert outcome.err == (
        f"error: the model is given twice: `{model}` and `{model}`\n\nhint: give one\n"
    )


def test_no_model(cli) -> None:
    outcome = cli("run")
    assert outcome.code == 2
    assert outcome.err == (
        "error: which model? MODEL is missing\n\n"
        "hint: `moecli list` shows what is here; `moecli run demo` takes the embedded one\n"
    )


def test_system_prompt_and_raw(cli, model) -> None:
    cli("run", model, "hello", "-s", "Be brief.")
    assert context() == "<system>Be brief.\n<user>hello\n<assistant>"
    cli("run", model, "Once upon", "--raw")
    assert context() == "Once upon"
    assert cli("run", model, "x", "--raw", "-s", "y").code == 2


def test_sampling_flags_arrive(cli, model) -> None:
    sampled = ["--temp", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "3"]
    cli("run", model, "hi", *sampled, "-n", "5", "--stop", "a", "--stop", "b")
    sampling = FakeEngine.opened[-1].calls[-1][1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, sampling.max_tokens) == (0.1, 3, 5)
    assert sampling.stop == ("a", "b")


def test_engine_flags_arrive(cli, model) -> None:
    flags = ["--ctx", "1k", "--ram", "20MiB", "--threads", "3", "--kernels", "reference"]
    assert cli("run", model, "hi", *flags).code == 0
    config = FakeEngine.opened[-1].config
    assert (config.ctx, config.ram_nbytes, config.threads) == (1024, 20 << 20, 3)
    assert config.kernels == "reference"


def test_placement_flags_arrive(cli, model) -> None:
    flags = ["--device", "cpu", "--placement", "slice", "--lane", "both", "--dense-scheme", "nf4"]
    flags += ["--kv-dtype", "int8"]
    assert cli("run", model, "hi", *flags).code == 0
    config = FakeEngine.opened[-1].config
    assert (config.device, config.placement, config.lane) == ("cpu", "slice", "both")
    assert (config.dense_scheme, config.kv_dtype, config.vram_nbytes) == ("nf4", "int8", None)


def test_vram_arrives_where_there_is_a_card(cli, model, monkeypatch) -> None:
    card = hardware.Machine(gpu_name="RTX", vram_total=10 << 30)
    monkeypatch.setattr(hardware, "detect", lambda **_: card)
    assert cli("run", model, "hi", "--vram", "8GiB").code == 0
    assert FakeEngine.opened[-1].config.vram_nbytes == 8 << 30
    assert cli("run", model, "hi", "--vram", "50%", "--device", "cuda").code == 0
    assert FakeEngine.opened[-1].config.vram_nbytes == 5 << 30


@pytest.mark.parametrize(("command", "rest"), [("run", ["hi"]), ("chat", [])])
@pytest.mark.parametrize("flags", [("--vram", "8GiB"), ("--device", "cuda")])
def test_a_card_that_is_asked_for_must_be_there(
    cli, model, monkeypatch, command, rest, flags
) -> None:
    monkeypatch.setattr(hardware, "detect", lambda **_: hardware.Machine())
    outcome = cli(command, model, *rest, *flags)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"error: `{flags[0] if flags[0] == '--vram' else ' '.join(flags)}` asks for a graphics "
        "card, but torch finds no CUDA device here\n\n"
        "hint: `moecli doctor` shows what is found; `--device cpu` runs on the processor\n"
    )
    assert not FakeEngine.opened
    assert cli(command, model, *rest, "--device", "cpu", "--vram", "8GiB").code == 0
    assert FakeEngine.opened[-1].config.vram_nbytes is None


def test_degraded_modes_are_said_aloud(cli, model, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_NOTE", "1")
    outcome = cli("run", model, "hi")
    assert (outcome.out, outcome.err) == ("you said: hi\n", "note: running on a fake\n")


def test_json(cli, model) -> None:
    outcome = cli("run", model, "hello", "--json")
    content = json.loads(outcome.out)
    assert outcome.err == ""
    assert (content["text"], content["reasoning"]) == ("you said: hello", None)
    assert content["model"] == model
    assert content["finish_reason"] == "stop"
    assert content["stats"]["generated_tokens"] == 2
    assert content["stats"]["hit_rate"] == 0.75
    assert content["plan"]["ram_budget"] == FakeEngine.opened[-1].plan.ram_budget


def test_reasoning_is_no_part_of_the_answer(cli, model) -> None:
    outcome = cli("run", model, "reason")
    assert (outcome.code, outcome.out, outcome.err) == (0, "so it is\n", "")
    content = json.loads(cli("run", model, "reason", "--json").out)
    assert (content["text"], content["reasoning"]) == ("so it is", "hmm \x1b[31m")
    raw = cli("run", model, "<user>reason", "--raw")
    assert raw.out == "<think>\nhmm \x1b[31m\n</think>\n\nso it is\n"


def test_an_answer_that_was_all_reasoning_is_explained(cli, model) -> None:
    outcome = cli("run", model, "reason", "-n", "1")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == (
        "`-n` tokens were thought before the answer began; more of them let it begin\n"
    )


def test_verbose_timings_on_stderr(cli, model) -> None:
    outcome = cli("run", model, "hello", "-v", "--ram", "14MiB")
    assert outcome.out == "you said: hello\n"
    assert outcome.err == (
        "prompt   23 tokens, 80.0 tok/s, first token after 0.25 s\n"
        "answer   2 tokens, 20.0 tok/s (planned: at most 93.8, limited by RAM bandwidth)\n"
        "a token  8.6 MiB from RAM (8.3 MiB planned), 156 KiB from disk (190 KiB planned), "
        "75.0% of experts hit (39.1% planned)\n"
        "experts  75.0% of 40 hit, 781 KiB read; 25 of 64 experts have a place in RAM\n"
        "memory   peak 100 MiB, 20.0 MiB of RAM since the model was opened; "
        "the plan takes 14.0 MiB of 14.0 MiB\n"
    )


def test_full_context_is_told(cli, model) -> None:
    outcome = cli("run", model, "fill")
    assert (outcome.code, outcome.out) == (0, "you said: fill\n")
    assert "context is full" in outcome.err
    assert "--ctx" in outcome.err


@pytest.mark.parametrize("prompt", [[], [""], ["  \n"]])
def test_empty_prompt(cli, model, prompt) -> None:
    outcome = cli("run", model, *prompt)
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("error: the prompt is empty\n\nhint: ")


def test_stdin_that_is_not_utf8_names_the_byte(cli, model) -> None:
    outcome = cli("run", model, stdin=b"caf\xe9 au lait")
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == "error: the prompt on stdin is not UTF-8: byte 3 is 0xe9"


def test_argument_that_is_not_utf8(cli, model) -> None:
    outcome = cli("run", model, b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert outcome.code == 1
    assert "UTF-8 at character 3" in outcome.err


def test_failure_of_the_engine(cli, model) -> None:
    outcome = cli("run", model, "too long")
    assert outcome.code == 1
    assert outcome.err == (
        "error: the prompt has 9999 tokens; the context holds 2048\n\nhint: shorten it\n"
    )


def test_our_own_fault_says_how_to_see_it(cli, model, monkeypatch) -> None:
    outcome = cli("run", model, "break")
    assert outcome.code == 1
    assert outcome.err == (
        "error: internal error: ZeroDivisionError: a fault in the fake\n\n"
        "hint: this is a bug in moecli; MOECLI_DEBUG=1 shows where\n"
    )
    monkeypatch.setenv("MOECLI_DEBUG", "1")
    assert "Traceback" in cli("run", model, "break").err


def test_unknown_model_names_close_ones(cli, model) -> None:
    outcome = cli("run", "tiny-int8-g32", "hello")
    assert outcome.code == 1
    assert outcome.err == (
        "error: no model is called `tiny-int8-g32`\n\nhint: did you mean `tiny-int4-g32`?\n"
    )
