"""The real command with a real model in a real pseudo-terminal."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = ">>> "


@pytest.fixture
def chat(quantized_demo: Path, home: Path) -> Iterator[pexpect.spawn]:
    budget = ("--ram", "16MiB", "--ctx", "1024", "--temp", "0", "--threads", "1")
    child = pexpect.spawn(
        sys.executable,
        ["-m", "moecli", "chat", str(quantized_demo), *budget],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 80),
    )
    child.expect_exact(PROMPT)
    yield child
    child.close(force=True)


def ask(child: pexpect.spawn, text: str) -> str:
    """The answer and the line of numbers, without the echo of what was typed."""
    child.sendline(text)
    child.expect_exact(text)  # after a resize the prompt may be drawn a second time before it
    child.expect_exact(PROMPT)
    return child.before


def test_a_conversation_from_first_word_to_ctrl_d(chat: pexpect.spawn, home: Path) -> None:
    assert "experts have a place in RAM" in chat.before
    assert "\x1b[2m" not in chat.before
    first = ask(chat, "What is the capital of France?")
    assert "tok/s" in first
    assert "expert hits" in first
    stats = ask(chat, "/stats")
    assert "answers  1" in stats

    chat.sendline("Tell me a long story about a fox called Vera.")
    chat.expect_exact("Vera.\r\n")
    chat.expect(r"\w+ \w+ \w+")
    chat.setwinsize(40, 50)  # a resize in the middle of an answer
    chat.sendintr()
    chat.expect_exact(PROMPT)
    assert "tok/s" in chat.before
    # Only what is new was processed: the rest stayed in the KV cache.
    second = ask(chat, "/stats")
    assert "cached)" in second
    assert "answers  2" in second

    saved = home / "talk.json"
    ask(chat, f"/save {saved}")
    ask(chat, "/clear")
    assert "answers  0" in ask(chat, "/stats")
    ask(chat, f"/load {saved}")
    again = ask(chat, "/regen")
    assert "tok/s" in again
    assert "there is no command" in ask(chat, "/nonsense")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert "Traceback" not in chat.before


def test_a_long_prompt_that_is_stopped_goes_on_where_it_was(
    chat: pexpect.spawn, home: Path
) -> None:
    (home / "long.txt").write_text("The fox went into the wood and came back again. " * 60)
    ask(chat, f"/read {home / 'long.txt'}")
    chat.sendline("What came back?")
    chat.expect(r"reading the prompt: \[-{20}\] 0 of (\d+) tokens")
    total = int(chat.match[1])
    chat.sendintr()
    chat.expect(rf"taken back\r\n(\d+) of {total} tokens were read; asked again, it goes on")
    read = int(chat.match[1])
    assert 0 < read < total
    chat.expect_exact(PROMPT)
    chat.sendline("What came back?")
    chat.expect_exact("tok/s")
    chat.expect_exact(PROMPT)
    assert f"({read} cached)" in ask(chat, "/stats")
