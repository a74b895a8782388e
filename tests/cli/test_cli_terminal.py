"""The command in a real pseudo-terminal: streaming, Ctrl-C, history, colours, sizes."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.cli import fakes
from tests.e2e import tiny

PROMPT = ">>> "
ROOT = Path(fakes.__file__).parents[2]
Spawn = Callable[..., pexpect.spawn]


@pytest.fixture
def spawn(home: Path, model: str) -> Iterator[Spawn]:
    """Starts `moecli` with the fake engine in a terminal of 24 lines and 80 columns."""
    children: list[pexpect.spawn] = []

    def start(*args: str, **environment: str) -> pexpect.spawn:
        out = environment.pop("SHELL_OUT", "/dev/tty")
        child = pexpect.spawn(
            "/bin/sh",
            ["-c", f'exec "$0" "$@" > {out}', sys.executable, "-m", "tests.cli.fakes", *args],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=str(home),
            encoding="utf-8",
            timeout=20,
            dimensions=(24, 80),
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


@pytest.fixture
def chat(spawn: Spawn, model: str) -> pexpect.spawn:
    child = spawn("chat", model)
    child.expect_exact(PROMPT)
    return child


def leave(child: pexpect.spawn) -> int:
    """Ctrl-D, and the exit code."""
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus is not None, f"ended by signal {child.signalstatus}"
    return child.exitstatus


def test_header_answer_and_numbers(spawn: Spawn, model: str) -> None:
    child = spawn("chat", model)
    child.expect_exact(PROMPT)
    header = re.sub(r"\x1b\[[?0-9;]*[a-z]", "", child.before).splitlines()
    header = [line for line in header if line]
    assert len(header) == 4
    assert header[0] == f"moecli 0.1.0 · {model}"
    assert "22.7M parameters" in header[1]
    assert "context 2048 tokens" in header[2]
    assert "/help" in header[3]
    child.sendline("hello")
    child.expect_exact("you said: hello\r\n")
    child.expect_exact(
        "\x1b[2m2 tokens, 20.0 tok/s (114.8 planned), first after 0.25 s, "
        "expert hits 75.0%, peak memory 100 MiB\x1b[0m"
    )
    child.expect_exact(PROMPT)
    assert leave(child) == 0


def test_loading_is_counted_on_a_terminal_alone(spawn: Spawn, cli, model: str, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_LOADING", "1")
    child = spawn("chat", model)
    child.expect_exact("loading the model: [#######-------------] 3 of 8 experts\r")
    child.expect_exact(PROMPT)
    assert leave(child) == 0
    assert cli("run", model, "hi").err == ""


def test_streams_stops_at_ctrl_c_keeps_what_was_written_and_stays(chat: pexpect.spawn) -> None:
    chat.sendline("endless")
    chat.expect_exact("w3 ")  # long before it could end
    chat.sendintr()
    chat.expect_exact(PROMPT)
    written = re.findall(r"w\d+ ", "w3 " + chat.before)
    assert 1 <= len(written) < 1000
    chat.sendline("/save talk.json")
    chat.expect_exact("saved 1 answer")
    chat.expect_exact(PROMPT)
    chat.sendline("still here?")
    chat.expect_exact("you said: still here?")
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0
    kept = (Path(str(chat.cwd)) / "talk.json").read_text()
    assert "w0 w1 w2 w3" in kept
    assert written[-1].strip() in kept


def test_ctrl_c_before_the_first_token_takes_the_question_back(chat: pexpect.spawn) -> None:
    chat.sendline("slow start")
    chat.expect_exact("reading the prompt: [")
    chat.sendintr()
    chat.expect_exact("the question is taken back")
    chat.expect_exact(PROMPT)
    chat.sendline("/regen")
    chat.expect_exact("there is no answer to write anew")
    chat.expect_exact(PROMPT)


def test_ctrl_c_at_the_prompt_names_ctrl_d(chat: pexpect.spawn) -> None:
    chat.sendintr()
    chat.expect_exact("Ctrl-D or /exit leaves")
    chat.expect_exact(PROMPT)
    chat.send("half a li")
    chat.expect_exact("half a li")
    chat.sendintr()
    chat.expect_exact(PROMPT)
    chat.sendline("one")
    chat.expect_exact("you said: one\r\n")
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0


def test_many_lines_and_wide_characters(chat: pexpect.spawn) -> None:
    chat.sendline('"""')
    chat.expect_exact("... ")
    chat.sendline("première")
    chat.expect_exact("... ")
    chat.sendline('漢字"""')
    chat.expect_exact("you said: première\r\n漢字\r\n")
    chat.expect_exact(PROMPT)
    chat.sendline("signs")
    chat.expect_exact("é 漢 👍🏽 [/INST] [bold]x[/bold]\r\n")
    chat.expect_exact(PROMPT)


def test_model_text_cannot_steer_the_terminal(chat: pexpect.spawn, cli, model) -> None:
    chat.sendline("escape")
    chat.expect_exact("\u241b[31mred\u2407\tend\r\n")
    assert cli("run", model, "escape").out == "\x1b[31mred\x07\tend\n", "piped it is data"


@pytest.mark.parametrize(("on", "off"), [("\x1b[2m", "\x1b[0m"), ("", "")])
def test_reasoning_is_dim_and_apart(spawn: Spawn, model: str, on: str, off: str) -> None:
    child = spawn("chat", model, **({} if on else {"NO_COLOR": "1"}))
    child.expect_exact(PROMPT)
    child.sendline("reason")
    child.expect_exact("reason\r\n")
    child.expect_exact(f"{on}Thinking...\r\n{off}{on}hm{off}{on}m \u241b[31m{off}")
    child.expect_exact(f"{on}\r\n...done thinking.\r\n\r\n{off}so it is\r\n")
    child.expect_exact(PROMPT)
    assert leave(child) == 0


def test_answers_alone_go_to_a_file(home: Path, spawn: Spawn, model: str) -> None:
    child = spawn("chat", model, SHELL_OUT="answers.txt")
    child.expect_exact(PROMPT)
    child.sendline("one")
    child.expect_exact("tok/s")
    child.expect_exact(PROMPT)
    assert leave(child) == 0
    assert (home / "answers.txt").read_text() == "you said: one\n"


def test_resize_while_it_writes_and_at_the_prompt(chat: pexpect.spawn) -> None:
    chat.setwinsize(10, 30)
    chat.sendline("endless")
    chat.expect_exact("w3 ")
    chat.setwinsize(40, 20)
    chat.expect_exact("w30 ")
    chat.setwinsize(50, 200)
    chat.expect_exact("w60 ")
    chat.sendintr()
    chat.expect_exact(PROMPT)
    chat.setwinsize(24, 80)
    chat.sendline("one")
    chat.expect_exact("you said: one")
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0


def test_errors_leave_the_chat_open(chat: pexpect.spawn) -> None:
    chat.sendline("one")
    chat.expect_exact(PROMPT)
    chat.sendline("too long")
    chat.expect_exact("the prompt has 9999 tokens")
    chat.expect_exact(PROMPT)
    chat.sendline("/stats")
    chat.expect_exact("context  34 of 2048 tokens")
    chat.expect_exact(PROMPT)
    chat.sendline("/nonsense")
    chat.expect_exact("there is no command `/nonsense`")
    chat.expect_exact(PROMPT)
    chat.sendline("one")
    chat.expect_exact("you said: one")
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_escape_codes_where_none_are_wanted(
    spawn: Spawn, model: str, environment: dict[str, str]
) -> None:
    # Bracketed paste is readline's own and no colour.
    (Path(os.environ["HOME"]) / ".inputrc").write_text("set enable-bracketed-paste off\n")
    child = spawn("chat", model, **environment)
    child.expect_exact(PROMPT)
    seen = child.before
    for line in ("hello", "/nonsense", "/help"):
        child.sendline(line)
        child.expect_exact(PROMPT)
        seen += child.before
    assert "tok/s" in seen
    assert "\x1b" not in seen


def test_history_outlives_the_chat(spawn: Spawn, chat: pexpect.spawn, model: str) -> None:
    chat.sendline("remember me")
    chat.expect_exact(PROMPT)
    assert leave(chat) == 0
    history = Path(os.environ["HOME"]) / ".local/state/moecli/history"
    assert "remember me" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "others may not read it"
    child = spawn("chat", model)
    child.expect_exact(PROMPT)
    child.send("\x1b[A")
    child.expect_exact("remember me")
    child.sendline("")
    child.expect_exact("you said: remember me")


def test_run_stops_at_ctrl_c_with_130(spawn: Spawn, model: str) -> None:
    child = spawn("run", model, "-p", "endless")
    child.sendeof()  # stdin is a terminal: not read
    child.expect_exact("w3 ")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_second_ctrl_c_is_not_held_back(chat: pexpect.spawn) -> None:
    chat.sendline("deaf")
    chat.expect_exact("now ")
    chat.kill(signal.SIGINT)
    time.sleep(0.1)  # two signals at once would be one
    chat.kill(signal.SIGINT)
    chat.expect_exact("stopped")
    chat.expect_exact(PROMPT)
    chat.sendline("/save talk.json")
    chat.expect_exact("saved 0 answers")
    chat.expect_exact(PROMPT)
    chat.sendline("/stats")
    chat.expect_exact("context  0 of 2048 tokens")  # what half a step left is dropped


def test_rm_asks(spawn: Spawn, models: Path, model: str) -> None:
    for reply, code, there in (("", 1, True), ("y", 0, False)):
        child = spawn("rm", model)
        child.expect(rf"delete `{model}` \(4.9 KiB\)\? \[y/N\] ")
        child.sendline(reply)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == code
        assert (models / model).exists() == there


def test_list_is_a_table_on_a_terminal(spawn: Spawn, model: str) -> None:
    child = spawn("list", COLUMNS="200", NO_COLOR="1")
    child.expect(pexpect.EOF)
    lines = child.before.splitlines()
    assert lines[0].split() == ["NAME", "SCHEME", "SIZE", "MODIFIED", "PATH"]
    assert lines[1].split()[:4] == [model, "int4-g32", "4.9", "KiB"]
    assert "\t" not in child.before
    assert "\x1b" not in child.before


def test_quantize_draws_a_bar(spawn: Spawn, home: Path) -> None:
    path = home / "Llama"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny.qwen3_config()))
    child = spawn("quantize", "Llama")
    child.expect_exact("100 B of 100 B")
    child.expect_exact("error 8.00%")
    child.expect_exact("moecli chat Llama-int4-g32")
    child.expect(pexpect.EOF)


def test_prompt_missing_on_a_terminal_is_a_usage_error(spawn: Spawn, model: str) -> None:
    child = spawn("run", model)
    child.expect_exact("the prompt is empty")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2
