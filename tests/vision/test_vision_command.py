"""The real command with a tiny model that sees: from a picture file to an answer."""

import json
from pathlib import Path

import pytest

from moecli.chat_template import ChatTemplate
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.events import Finished, Looking
from moecli.vision.picture import PictureReader
from tests.vision import seeing
from tests.vision.seeing import write_picture

DRAWN = ("--temp", "2", "--seed", "7", "-n", "24", "--kernels", "torch")  # any logit tells
GREEDY = ("--temp", "0", "-n", "8", "--kernels", "torch")


def test_a_run_answers_about_its_picture(real_cli, home: Path, seeing_model: Path) -> None:
    for seed in (0, 5):
        write_picture(home / f"{seed}.png", 100, 151, seed)
    first, again, other, blind = (
        real_cli("run", seeing_model, "what is this?", *DRAWN, "--json", *images)
        for images in [
            *(("--image", "0.png"), ("--image", "0.png"), ("--image", "5.png"), ()),
        ]
    )
    texts = [json.loads(outcome.out)["text"] for outcome in (first, again, other, blind)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3, "the answer does not depend on the picture"
    content = json.loads(first.out)
    assert content["stats"]["image_tokens"] == 28
    assert content["images"][0] == {
        "path": str(home / "0.png"),
        "sha256": content["images"][0]["sha256"],
        **{"width": 151, "height": 100, "grid": [2, 3], "tiles": 7, "tokens": 37},
    }
    assert {sum(row) for row in content["expert_choices"]["image"].values()} == {28}
    assert "images" not in json.loads(blind.out)


def test_verbose_tells_of_pictures_and_of_choices(real_cli, home: Path, seeing_model: Path) -> None:
    write_picture(home / "a.png", 56, 56)
    outcome = real_cli("run", seeing_model, "what?", *GREEDY, "-v", "--image", "a.png")
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert any(line.startswith("pictures 4 tokens of the prompt, looked at for ") for line in lines)
    told = next(line for line in lines if line.startswith("choices "))
    assert "of image tokens, the busiest expert of a layer takes " in told
    assert "of text tokens; alike in " in told


def test_a_chat_shows_pictures(real_cli, home: Path, seeing_model: Path) -> None:
    write_picture(home / "a.png", 56, 56)
    lines = "/image a.png\nwhat?\n/stats\nand now?\n"
    outcome = real_cli("chat", seeing_model, *GREEDY, stdin=lines.encode())
    assert outcome.code == 0
    assert "in one tile, 7 tokens, goes before your next message" in outcome.err
    assert "pictures 4 tokens of the prompt" in outcome.err
    assert "choices  the busiest expert of a layer takes" in outcome.err


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("what is <|image|>?", (), "names `<|image|>` 2 times for 1 pictures"),
        ("<|image|> or <|image|>", ("--raw",), "names `<|image|>` 2 times for 1 pictures"),
        ("what is <|patch|>?", (), "has 5 patches for pictures that take 4"),
        ("x" * 600, (), "the context holds 512"),
    ],
)
def test_prompts_that_do_not_fit_their_pictures(
    real_cli, home: Path, seeing_model: Path, text: str, flags: tuple, message: str
) -> None:
    write_picture(home / "a.png", 56, 56)
    outcome = real_cli("run", seeing_model, text, *GREEDY, *flags, "--image", "a.png")
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert "hint: " in outcome.err


def test_a_template_that_places_no_pictures_is_told(seeing_model: Path, tmp_path: Path) -> None:
    picture = PictureReader.of(seeing_model).read(write_picture(tmp_path / "a.png", 56, 56))
    messages = [{"role": "user", "content": "what?", "images": [picture]}]
    with Engine.open(seeing_model, EngineConfig(ctx=128)) as engine:
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        engine.tokenizer.template = ChatTemplate(template, {})
        with pytest.raises(MoecliError, match="0 times for 1 pictures"):
            engine.encode_chat(messages)


def test_who_stops_while_a_picture_is_looked_at_gets_no_answer_and_a_sound_session(
    seeing_model: Path, tmp_path: Path
) -> None:
    picture = PictureReader.of(seeing_model).read(write_picture(tmp_path / "a.png", 56, 56))
    sampling = SamplingConfig(temperature=0, max_tokens=4, ignore_eos=True)
    with Engine.open(seeing_model, EngineConfig(ctx=128, prefill_chunk=8)) as engine:
        ids = engine.encode_chat([{"role": "user", "content": "what?", "images": [picture]}])
        wanted = list(engine.generate(engine.new_session(), ids, sampling, pictures=[picture]))[-1]
        session, looking = engine.new_session(), []

        def cancelled() -> bool:
            """In the middle of the tower, after some chunks of text before it."""
            looking.append(None)
            return len(looking) == 6

        events = list(engine.generate(session, ids, sampling, cancelled, [picture]))
        assert isinstance(events[-1], Finished)
        assert (events[-1].reason, events[-1].text) == ("cancelled", "")
        assert isinstance(events[-2], Looking), "it was not the tower that was stopped"
        assert 0 < len(session.tokens) == session.cache.length
        assert len(session.tokens) <= ids.index(seeing.IDS["<|patch|>"])
        held = len(session.tokens)
        again = list(engine.generate(session, ids, sampling, pictures=[picture]))[-1]
        assert again.stats.cached_tokens == held
        assert again.text == wanted.text


def test_compiled_kernels_see_the_same_in_chunks_of_few_tokens(
    seeing_model: Path, tmp_path: Path
) -> None:
    """Chunks of few tokens go another way through the layers: a picture is in its hidden state."""
    picture = PictureReader.of(seeing_model).read(write_picture(tmp_path / "a.png", 90, 151))
    sampling = SamplingConfig(temperature=0, max_tokens=1, ignore_eos=True)
    found = []
    for chunk in (3, 512):
        with Engine.open(seeing_model, EngineConfig(ctx=128, prefill_chunk=chunk)) as engine:
            forward = engine.decoder.forward
            logits = []
            engine.decoder.forward = lambda batch, f=forward, kept=logits: (
                kept.append(f(batch)) or kept[-1]
            )
            ids = engine.encode_text("<|image|>: what?", [picture])
            list(engine.generate(engine.new_session(), ids, sampling, pictures=[picture]))
            found.append(logits[-1][0])
    assert (found[0] - found[1]).abs().max() < 0.25 * found[1].std()


def test_a_picture_needs_a_model_that_sees(tmp_path: Path, seeing_model: Path) -> None:
    from moecli import store

    with pytest.raises(MoecliError, match="sees no pictures"):
        PictureReader.of(store.demo_source())
