"""`moecli chat` with stdin piped in: commands, what the engine is given, what is kept."""

import json

import pytest

from moecli.chat import Conversation
from moecli.errors import MoecliError
from tests.cli.fakes import FakeEngine


@pytest.fixture
def chat(cli, model):
    """Runs a chat over some lines."""

    def call(*lines: str, flags: tuple[str, ...] = ()):
        return cli("chat", model, *flags, stdin="".join(f"{line}\n" for line in lines).encode())

    return call


def contexts() -> list[str]:
    return [context for context, _ in FakeEngine.opened[-1].calls]


def sampling(call: int = -1):
    return FakeEngine.opened[-1].calls[call][1]


def test_answers_on_stdout_and_nothing_else(chat) -> None:
    outcome = chat("one", "", "two")
    assert (outcome.code, outcome.out, outcome.err) == (0, "you said: one\nyou said: two\n", "")


def test_every_turn_gives_the_whole_conversation(chat) -> None:
    chat("one", "two", flags=("-s", "Be brief."))
    assert contexts() == [
        "<system>Be brief.\n<user>one\n<assistant>",
        "<system>Be brief.\n<user>one\n<assistant>you said: one\n<user>two\n<assistant>",
    ]


def test_many_lines(chat) -> None:
    chat('"""', "first", "  second", '"""', '"""one"""', '"""a', 'b"""')
    assert contexts()[0] == "<user>first\n  second\n<assistant>"
    assert "<user>one\n<assistant>" in contexts()[1]
    assert contexts()[2].endswith("<user>a\nb\n<assistant>")


def test_leaving(chat) -> None:
    for word in ("/exit", "/bye", "/quit"):
        outcome = chat("one", word, "two")
        assert (outcome.code, outcome.out) == (0, "you said: one\n")


def test_unknown_command_says_so_and_stays(chat) -> None:
    outcome = chat("/sav x", "/etc/passwd", "one")
    assert (outcome.code, outcome.out) == (0, "you said: one\n")
    assert outcome.err == (
        "error: there is no command `/sav`\n\nhint: did you mean `/save`? /help lists all\n"
        "error: there is no command `/etc/passwd`\n\nhint: /help lists all\n"
    )


def test_help_names_every_command(chat) -> None:
    help = chat("/help").err
    commands = "/help /exit /bye /quit /clear /system /set /save /load /regen /read /stats /show"
    for command in commands.split():
        assert command in help


def test_clear_forgets_the_turns_and_keeps_the_system_prompt(chat) -> None:
    chat("one", "/clear", "two", flags=("-s", "Be brief."))
    assert contexts()[1] == "<system>Be brief.\n<user>two\n<assistant>"
    assert "context  0 of 2048 tokens\nanswers  0\n" in chat("one", "/clear", "/stats").err


def test_system(chat) -> None:
    outcome = chat("/system", "/system Be brief.", "/system", "one", "/system none", "two")
    assert contexts()[0].startswith("<system>Be brief.\n<user>one")
    assert contexts()[1].startswith("<user>one")
    assert "\nBe brief.\n" in outcome.err


def test_set(chat) -> None:
    chat("/set temp 0.25", "/set top-p 0.5", "/set seed 7", "/set max_tokens 1", "one")
    assert (sampling().temperature, sampling().top_p, sampling().seed) == (0.25, 0.5, 7)
    assert chat("/set max_tokens 1", "one", "/set max_tokens none", "two").out == (
        "you said: \nyou said: two\n"
    )
    assert "temp        0.7" in chat("/set").err


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("ctx 4096", "`--ctx`"),
        ("colour red", "`colour`"),
        ("temp", "to what"),
        ("temp warm", "warm"),
        ("temp -1", "`--temp`"),
        ("temp none", "none"),
    ],
)
def test_set_that_cannot_be(chat, argument, word) -> None:
    outcome = chat(f"/set {argument}", "one")
    assert outcome.err.startswith("error: ")
    assert word in outcome.err
    assert sampling().temperature == 0.7


def test_save_and_load(chat, home) -> None:
    outcome = chat("one", "signs", "/save talk.json", flags=("-s", "Be brief."))
    assert "saved 2 answers to `talk.json`" in outcome.err
    content = json.loads((home / "talk.json").read_text())
    assert (content["format"], content["version"]) == ("moecli-chat", 1)
    outcome = chat("/load talk.json", "three")
    assert "loaded 2 answers" in outcome.err
    assert contexts() == [
        "<system>Be brief.\n<user>one\n<assistant>you said: one\n<user>signs\n"
        "<assistant>é 漢 👍🏽 [/INST] [bold]x[/bold]\n<user>three\n<assistant>"
    ]


def test_save_goes_over_saved_chats_only(chat, home) -> None:
    chat("one", "/save talk.json")
    assert "saved 2 answers" in chat("one", "two", "/save talk.json").err
    (home / "notes.txt").write_text("mine")
    assert "exists and is not a saved chat" in chat("one", "/save notes.txt").err
    assert (home / "notes.txt").read_text() == "mine"
    assert "cannot write" in chat("one", "/save nowhere/talk.json").err
    assert sorted(path.name for path in home.glob("*") if path.is_file()) == [
        *("notes.txt", "talk.json"),
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"not json",
        b"[]",
        b"\xff\xfe",
        b'{"version": 1}',
        b'{"format": "moecli-chat", "version": 3, "turns": []}',
        b'{"format": "moecli-chat", "version": 1}',
        b'{"format": "moecli-chat", "version": 1, "turns": [{"role": "user", "content": "x"}]}',
        b'{"format": "moecli-chat", "version": 1, "turns": [{"role": "assistant"}, 3]}',
        b'{"format": "moecli-chat", "version": 1, "turns": [], "system": 3}',
        b'{"format": "moecli-chat", "version": 1, "turns": [], "system": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_file_that_is_no_chat_leaves_the_conversation(chat, home, raw) -> None:
    (home / "talk.json").write_bytes(raw)
    outcome = chat("one", "/load talk.json", "two")
    assert outcome.code == 0
    assert outcome.err.startswith("error: `talk.json` ")
    assert contexts()[1].startswith("<user>one\n<assistant>you said: one\n<user>two")


def test_load_of_a_file_that_is_not_there(chat) -> None:
    assert "there is no file `talk.json`" in chat("/load talk.json").err
    assert "name of the file is missing" in chat("/load").err
    assert "`.`" in chat("/load .").err


def test_regen_asks_the_last_question_again(chat) -> None:
    assert chat("one", "/regen").out == "you said: one\nyou said: one\n"
    assert contexts()[0] == contexts()[1]
    assert "no answer to write anew" in chat("/regen").err


def test_regen_that_fails_keeps_the_old_answer(chat) -> None:
    outcome = chat("once", "/regen", "two")
    assert outcome.err == "error: I said it once\n\nhint: ask something else\n"
    assert contexts()[-1] == "<user>once\n<assistant>you said: once\n<user>two\n<assistant>"


def test_read_puts_a_file_before_the_next_message(chat, home) -> None:
    (home / "notes.txt").write_text("from a file\n")
    chat("/read notes.txt", "what is it?", "and now?")
    assert contexts()[0] == "<user>from a file\n\nwhat is it?\n<assistant>"
    assert contexts()[1].endswith("<user>and now?\n<assistant>")
    (home / "notes.txt").write_bytes(b"ab\xff")
    assert "not UTF-8 text: byte 2" in chat("/read notes.txt").err
    assert "cannot read `nowhere.txt`" in chat("/read nowhere.txt").err


def test_stats_and_show(chat) -> None:
    outcome = chat("/stats", "one", "/stats", "/show")
    assert "answer   2 tokens, 20.0 tok/s" in outcome.err
    assert "context  34 of 2048 tokens" in outcome.err
    assert "experts  75.0% hit since the start" in outcome.err
    assert "sampling temperature 0.7" in outcome.err


def test_full_context_says_what_can_be_done(chat) -> None:
    outcome = chat("fill")
    assert "context of 2048 tokens is full: /clear starts afresh" in outcome.err


def test_failure_in_a_pipe_ends_with_1(chat) -> None:
    outcome = chat("one", "too long", "two")
    assert (outcome.code, outcome.out) == (1, "you said: one\n")
    assert "9999 tokens" in outcome.err


def test_stdin_that_is_not_utf8(cli, model) -> None:
    outcome = cli("chat", model, stdin="é\n".encode() + b"caf\xe9\n")
    assert (outcome.code, outcome.out) == (1, "you said: é\n")
    assert "byte 6 is 0xe9" in outcome.err


def test_without_a_model_the_embedded_one(cli, models) -> None:
    outcome = cli("chat", stdin=b"one\n")
    assert outcome.out == "you said: one\n"
    assert outcome.err.startswith("quantizing the embedded model to int4, once\n")
    assert FakeEngine.opened[-1].path == models / "demo-int4-g32"


def test_conversation_turns_alternate() -> None:
    conversation = Conversation()
    with pytest.raises(AssertionError):
        conversation.answer("x")
    conversation.ask("x")
    with pytest.raises(AssertionError):
        conversation.ask("y")
    assert conversation.take_back_question() == "x"
    with pytest.raises(MoecliError):
        conversation.take_back_answer()
