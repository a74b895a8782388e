"""Logits with pictures against transformers on a tiny random Llama4ForConditionalGeneration.

The library gets our tiles: test_vision_tiles.py holds that they are its own processor's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.events import Finished, Looking, PrefillProgress
from moecli.kv_cache import KvCache
from moecli.prompt import place
from moecli.session import Session
from moecli.vision.picture import Picture, PictureReader
from tests.vision import seeing

TOLERANCE = 3e-5  # of fp32 logits of magnitude 1 to 20
CTX = 400
GREEDY = SamplingConfig(temperature=0, max_tokens=6, ignore_eos=True)
SIZES = [(56, 56), (100, 151), (57, 300), (13, 40), (301, 97)]  # height, width


def _config(**changes) -> EngineConfig:
    """Kernels in fp32: the compiled ones round activations to 8 bits."""
    return EngineConfig(ctx=CTX, kernels="torch", **changes)


@pytest.fixture(scope="module")
def theirs(seeing_model: Path) -> torch.nn.Module:
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(seeing_model, dtype=torch.float32)
    for parameter in model.parameters():  # fused experts stay bf16 whatever is asked for
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.eval()


@pytest.fixture(scope="module")
def pictures(seeing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """Of odd sizes, one after the other as SIZES has them."""
    root, reader = tmp_path_factory.mktemp("pictures"), PictureReader.of(seeing_model)
    return [
        reader.read(seeing.write_picture(root / f"{index}.png", *size))
        for index, size in enumerate(SIZES)
    ]


class Recorded:
    """An engine, and the logits that its decoder gave, by the position of their token."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.logits: dict[int, Tensor] = {}
        forward = engine.decoder.forward

        def record(batch) -> Tensor:
            found = forward(batch)
            self.logits[batch.end - 1] = found[0]
            return found

        monkeypatch.setattr(engine.decoder, "forward", record)

    def new_session(self) -> Session:
        """With a KV cache of fp32, as the library has."""
        self.logits.clear()
        return Session(KvCache(self.engine.spec, CTX, torch.float32))

    def answer(
        self, session: Session, ids: list[int], pictures: Sequence[Picture], number: int = 6
    ) -> Finished:
        self.logits.clear()
        *self.events, last = self.engine.generate(session, ids, GREEDY, pictures=pictures)
        assert isinstance(last, Finished)
        assert last.stats.generated_tokens == number
        return last


@pytest.fixture(params=[20, 512], ids=lambda size: f"chunks of {size}")
def ours(
    request: pytest.FixtureRequest, seeing_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorded]:
    with Engine.open(seeing_model, _config(prefill_chunk=request.param)) as engine:
        yield Recorded(engine, monkeypatch)


@torch.no_grad()
def expected(model: torch.nn.Module, tokens: list[int], pictures: Sequence[Picture]) -> Tensor:
    """Logits [T, V] of the library's forward over everything at once."""
    pixels = torch.cat([picture.pixels() for picture in pictures]).float()
    return model(torch.tensor([tokens]), pixel_values=pixels, use_cache=False).logits[0]


def assert_equal(
    ours: Recorded, session: Session, theirs: torch.nn.Module, pictures: Sequence[Picture]
) -> None:
    """What was recorded is what the library computes for all that the session holds."""
    assert len(ours.logits) >= 6
    wanted = expected(theirs, session.tokens, pictures)
    assert wanted.abs().max() > 1, "the logits are too small to compare"
    for position, found in ours.logits.items():
        assert (found - wanted[position]).abs().max() < TOLERANCE, position


def ask(text: str, *pictures: Picture) -> dict:
    return {"role": "user", "content": text, "images": pictures}


@pytest.mark.parametrize("index", range(len(SIZES)), ids=lambda index: str(SIZES[index]))
def test_one_picture_of_any_size(ours, theirs, pictures, index: int) -> None:
    one = pictures[index]
    ids = ours.engine.encode_chat([ask("what is this?", one)])
    session = ours.new_session()
    finished = ours.answer(session, ids, [one])
    assert_equal(ours, session, theirs, [one])
    assert finished.stats.image_tokens == one.num_patches
    assert 0 < finished.stats.looking_s < finished.stats.ttft_s


def test_several_pictures_in_one_message(ours, theirs, pictures) -> None:
    ids = ours.engine.encode_chat([ask("compare these", *pictures[:4])])
    session = ours.new_session()
    ours.answer(session, ids, pictures[:4])
    assert_equal(ours, session, theirs, pictures[:4])
    looked = [event for event in ours.events if isinstance(event, Looking)]
    assert looked == [Looking(number, 4) for number in (1, 2, 3, 4)]


def test_embeddings_are_kept_while_their_chunks_pass_alone(ours, pictures) -> None:
    """A plan counts those of two pictures; a prompt may show many."""
    shown = pictures[:4]
    engine, ids = ours.engine, ours.engine.encode_chat([ask("compare these", *pictures[:4])])
    prompt = place(ids, shown, seeing.IDS["<|patch|>"])
    kept = []
    for event in engine.generate(ours.new_session(), ids, GREEDY, pictures=shown):
        if isinstance(event, PrefillProgress) and event.done:
            kept.append([engine.eye.has_seen(placed) for placed in prompt.pictures])
    assert kept[0][0], "nothing was looked at"
    if len(kept) > 1:  # chunks shorter than a picture
        assert max(map(sum, kept)) <= 2
    assert not any(engine.eye.has_seen(placed) for placed in prompt.pictures)


def test_pictures_in_the_middle_of_a_raw_prompt(ours, theirs, pictures) -> None:
    shown = [pictures[2], pictures[0]]
    ids = ours.engine.encode_text("first <|image|> and then <|image|>: which?", shown)
    session = ours.new_session()
    ours.answer(session, ids, shown)
    assert_equal(ours, session, theirs, shown)


def test_two_turns_look_at_each_picture_once(ours, theirs, pictures) -> None:
    session, (one, other) = ours.new_session(), pictures[1:3]
    first = ours.answer(session, ours.engine.encode_chat([ask("what?", one)], session), [one])
    held = list(session.tokens)
    turns = [ask("what?", one), {"role": "assistant", "content": first.text}]
    ids = ours.engine.encode_chat([*turns, ask("and this?", other)], session)
    second = ours.answer(session, ids, [one, other])
    assert_equal(ours, session, theirs, [one, other])
    if session.tokens[: len(held)] == held:  # else the answer was no text that can be encoded
        assert second.stats.cached_tokens == len(held)
        assert [event for event in ours.events if isinstance(event, Looking)] == [Looking(2, 2)]


def test_another_picture_of_the_same_size_is_another_prefix(
    ours, theirs, pictures, seeing_model: Path, tmp_path: Path
) -> None:
    """Its tokens are the same: without a look at the picture, the KV cache would answer."""
    reader = PictureReader.of(seeing_model)
    other = reader.read(seeing.write_picture(tmp_path / "other.png", *SIZES[1], seed=5))
    session, one = ours.new_session(), pictures[1]
    ids = ours.engine.encode_chat([ask("what is this?", one)])
    assert ids == ours.engine.encode_chat([ask("what is this?", other)])
    ours.answer(session, ids, [one])
    before = ours.logits[len(ids) - 1].clone()
    again = ours.answer(session, ids, [other])
    assert again.stats.cached_tokens <= ids.index(seeing.IDS["<|patch|>"])
    assert_equal(ours, session, theirs, [other])
    assert (ours.logits[len(ids) - 1] - before).abs().max() > 0.1
    same = ours.answer(session, ids, [reader.read(other.path)])
    assert same.stats.cached_tokens == len(ids) - 1
    assert_equal(ours, session, theirs, [other])


def test_a_picture_taken_away_leaves_nothing_of_it(ours, theirs, pictures) -> None:
    """A prompt of the same tokens whose patches are those of no picture: just embeddings."""
    session, one = ours.new_session(), pictures[0]
    ids = ours.engine.encode_chat([ask("what is this?", one)])
    ours.answer(session, ids, [one])
    without = ours.answer(session, ids, [])
    assert without.stats.cached_tokens <= ids.index(seeing.IDS["<|patch|>"])
    with torch.no_grad():
        wanted = theirs(torch.tensor([session.tokens]), use_cache=False).logits[0]
    for position, found in ours.logits.items():
        assert (found - wanted[position]).abs().max() < TOLERANCE


def test_the_simulated_device_sees_the_same(seeing_model: Path, theirs, pictures) -> None:
    """The path of a card, in main memory: its KV cache is bf16, so the tolerance is wider."""
    config = _config(prefill_chunk=20, device="simulated", vram_nbytes=1 << 30)
    with Engine.open(seeing_model, config) as engine:
        session = engine.new_session()
        ids = engine.encode_chat([ask("what is this?", *pictures[1:3])])
        recorded = {}
        forward = engine.decoder.forward

        def record(batch) -> Tensor:
            found = forward(batch)
            recorded[batch.end - 1] = found[0]
            return found

        engine.decoder.forward = record
        list(engine.generate(session, ids, GREEDY, pictures=pictures[1:3]))
    wanted = expected(theirs, ids, pictures[1:3])
    assert len(recorded) == -(-len(ids) // 20)
    for position, found in recorded.items():
        assert (found - wanted[position]).abs().max() < 0.02 * wanted[position].std()
