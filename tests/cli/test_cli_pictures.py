"""`run --image` and `/image` with the fake engine: what it is given, what is said, what is kept."""

import json
from pathlib import Path

import pytest

from tests.cli import fakes
from tests.cli.fakes import FakeEngine
from tests.vision.seeing import CONFIG, write_picture


@pytest.fixture
def seeing(models: Path) -> str:
    """The name of a model that sees."""
    path = fakes.write_model(models / "seeing-int4")
    config = {"architectures": ["Llama4ForConditionalGeneration"], **CONFIG}
    (path / "config.json").write_text(json.dumps(config))
    processor = {"size": {"height": 56, "width": 56}, "max_patches": 6}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path.name


@pytest.fixture
def blind(models: Path) -> str:
    """The name of a model that does not."""
    path = fakes.write_model(models / "blind-int4")
    config = {"architectures": ["Llama4ForCausalLM"], **CONFIG["text_config"]}
    (path / "config.json").write_text(json.dumps(config))
    return path.name


@pytest.fixture
def one(home: Path) -> Path:
    return write_picture(home / "one.png", 100, 151)


@pytest.fixture
def chat(cli, seeing: str):
    """Runs a chat over some lines."""

    def call(*lines: str):
        return cli("chat", seeing, stdin="".join(f"{line}\n" for line in lines).encode())

    return call


def contexts() -> list[str]:
    return [context for context, _ in FakeEngine.opened[-1].calls]


def test_pictures_of_a_run_come_before_the_prompt(cli, seeing, one, home) -> None:
    write_picture(home / "two.png", 40, 40)
    outcome = cli("run", seeing, "hi", "--image", "one.png", "--image", "two.png")
    assert (outcome.code, outcome.err) == (0, "")
    assert contexts() == ["<user>[one.png][two.png]hi\n<assistant>"]
    assert FakeEngine.opened[-1].shown == [["one.png", "two.png"]]
    cli("run", seeing, "-p", "hi", "--image", str(one), "--raw")
    assert contexts() == ["[one.png]hi"]


def test_what_is_wrong_with_a_picture_is_told_before_the_model_is_opened(
    cli, seeing, blind, model, one, home
) -> None:
    (home / "text.png").write_text("no picture")
    for name, file, message in [
        (seeing, "none.png", "error: there is no file `none.png`\n"),
        (seeing, "text.png", "error: `text.png` is no picture that can be read\n\nhint: PNG, JPEG"),
        (blind, "one.png", "error: `blind-int4` sees no pictures here: moecli knows no vision"),
        (model, "one.png", "error: "),  # without a config.json
    ]:
        outcome = cli("run", name, "hi", "--image", file)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err.startswith(message)
    assert FakeEngine.opened == []


def test_a_picture_goes_with_the_next_message_alone(chat, one) -> None:
    outcome = chat("/image one.png", "what?", "and?")
    assert outcome.err == (
        "`one.png`, 151 x 100 pixels in 2 x 3 tiles and one of all, 37 tokens, goes before your "
        "next message\n"
    )
    assert contexts() == [
        "<user>[one.png]what?\n<assistant>",
        "<user>[one.png]what?\n<assistant>you said: [one.png]what?\n<user>and?\n<assistant>",
    ]
    assert FakeEngine.opened[-1].shown == [["one.png"], ["one.png"]]


def test_several_pictures_and_texts_and_none(chat, one, home) -> None:
    write_picture(home / "two.png", 56, 56)
    (home / "text.txt").write_text("a text")
    outcome = chat("/image two.png", "/image ~/one.png", "/read text.txt", "x", "/image one.png")
    assert "in one tile, 7 tokens" in outcome.err
    assert contexts() == ["<user>[two.png][one.png]a text\n\nx\n<assistant>"]
    outcome = chat("/image one.png", "/image none", "y", "/image one.png", "/clear", "z")
    assert contexts() == [
        *("<user>y\n<assistant>", "<user>z\n<assistant>"),
    ]


def test_a_question_that_is_taken_back_leaves_its_picture_for_the_next(chat, one) -> None:
    chat("/image one.png", "x", "/image one.png", "break encode", "y")
    assert contexts()[-1] == "<user>[one.png]x\n<assistant>"
    chat("/image one.png", "once", "/regen")
    assert contexts()[1] == contexts()[0], "an answer anew sees the same picture"


def test_failures_of_a_picture_leave_the_chat_as_it_was(chat, one) -> None:
    outcome = chat("/image", "/image none.png", "x")
    assert "the name of the file is missing\n\nhint: for example `/image photo.jpg`" in outcome.err
    assert "error: there is no file `none.png`" in outcome.err
    assert contexts() == ["<user>x\n<assistant>"]


def test_a_saved_chat_names_its_pictures_and_is_loaded_with_them(chat, one, home) -> None:
    chat("/image one.png", "what?", "/save talk.json")
    content = json.loads((home / "talk.json").read_text())
    assert content["version"] == 2
    (image,) = content["turns"][0]["images"]
    assert (image["path"], len(image["sha256"])) == (str(one), 64)
    assert "images" not in content["turns"][1]
    outcome = chat("/load talk.json", "and?", "/save talk.json")
    assert "loaded 1 answer" in outcome.err
    assert contexts()[0].startswith("<user>[one.png]what?\n<assistant>")
    assert json.loads((home / "talk.json").read_text())["turns"][0]["images"] == [image]


def test_a_chat_without_pictures_is_saved_as_before(chat, home) -> None:
    chat("x", "/save talk.json")
    assert json.loads((home / "talk.json").read_text())["version"] == 1


def test_a_changed_or_lost_picture_is_not_passed_off_as_the_old_one(chat, cli, blind, one) -> None:
    chat("/image one.png", "what?", "/save talk.json")
    write_picture(one, 100, 151, seed=1)
    outcome = chat("/load talk.json", "x")
    assert "is not the picture that it was when the chat was saved" in outcome.err
    assert contexts() == ["<user>x\n<assistant>"], "the chat is what it was"
    one.unlink()
    assert "there is no file" in chat("/load talk.json").err
    assert "saved 1 answer" in chat("x", "/save talk.json").err, "it can still be overwritten"
    chat("/image one.png", "what?", "/save talk.json")
    write_picture(one, 9, 9)
    chat("/image one.png", "what?", "/save talk.json")
    outcome = cli("chat", blind, stdin=b"/load talk.json\n")
    assert "`blind-int4` sees no pictures" in outcome.err


@pytest.mark.parametrize(
    "images", ['"x"', "[3]", '[{"path": "a.png"}]', '[{"path": 3, "sha256": "x"}]']
)
def test_a_saved_chat_with_odd_pictures_is_none(chat, home, images: str) -> None:
    turns = f'[{{"role": "user", "content": "x", "images": {images}}}, '
    turns += '{"role": "assistant", "content": "y"}]'
    (home / "talk.json").write_text(f'{{"format": "moecli-chat", "version": 2, "turns": {turns}}}')
    assert "`talk.json` is not a saved chat" in chat("/load talk.json").err
