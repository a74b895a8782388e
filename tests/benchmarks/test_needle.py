"""Retrieval by length and depth: what is asked, what counts, what is refused."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import needle as bench
from benchmarks.needle import ANSWER_TOKENS, Needle, Prompts, Row
from moecli import stepwise
from moecli.config import EngineConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from moecli.errors import MoecliError
from quant.scheme import QuantScheme
from tests.e2e import tiny

HIDDEN = Needle("Oslo", 12345)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 whose tokens are bytes, with a context of 512 in chunks of 32."""
    root = tmp_path_factory.mktemp("needle")
    source = tiny.write_checkpoint(root / "source")
    quantize_model(source, root / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    return root / "out"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("12345", True),
        ("It is 12,345.", True),
        ("12 345", True),
        ("123456", False),
        ("1234 5", False),
        ("112345", False),
        ("", False),
    ],
)
def test_an_answer_counts_where_it_names_the_number(answer: str, found: bool) -> None:
    assert HIDDEN.is_in(answer) is found


def test_the_needle_lies_as_deep_as_is_said_and_the_text_is_always_the_same() -> None:
    sentences = list(islice(bench.filler(0), 40))
    assert sentences == list(islice(bench.filler(0), 40)) != list(islice(bench.filler(1), 40))
    for depth, before in ((0, 0), (25, 10), (50, 20), (100, 40)):
        text = bench.haystack(sentences, HIDDEN, depth)
        assert text.partition(HIDDEN.sentence)[0].count(".") == before
        assert text.replace(HIDDEN.sentence, "").split() == " ".join(sentences).split()
    assert bench.needle(3) == bench.needle(3) != bench.needle(4)
    assert not any(char.isdigit() for char in " ".join(sentences))


def test_lengths_leave_room_for_an_answer_in_the_model_s_own_context() -> None:
    assert bench.lengths_for(None, 8192) == [1024, 2048, 4096]
    assert bench.lengths_for(None, 512) == [512 - ANSWER_TOKENS]
    assert bench.lengths_for([100, 448], 512) == [100, 448]
    with pytest.raises(MoecliError, match="449 tokens are too many: the model's context is 512"):
        bench.lengths_for([100, 449], 512)


@pytest.mark.parametrize("raw", [False, True])
def test_prompts_are_filled_up_to_their_length(quantized: Path, raw: bool) -> None:
    with Engine.open(quantized, EngineConfig(ctx=512)) as engine:
        prompts = Prompts(engine, raw)
        sentences = prompts.sentences(448, HIDDEN, seed=0)
        ids = prompts.encode(bench.haystack(sentences, HIDDEN, 50), HIDDEN)
        assert 448 - 60 < len(ids) <= 448, "a sentence is at most 60 characters, hence tokens"
        text = engine.tokenizer.decode(ids)
        assert text.endswith(HIDDEN.opening) if raw else HIDDEN.question in text
        with pytest.raises(MoecliError, match="hold no text"):
            prompts.sentences(100, HIDDEN, seed=0)


def test_a_model_that_reads_finds_it(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The model is random; what it says is scripted: the number for the first depth alone."""
    number = str(bench.needle(0).number)
    with Engine.open(quantized, EngineConfig(ctx=512)) as engine:
        tokens = engine.tokenizer.encode(f"{number}<|eot|>no<|eot|>")
    said = iter(tokens)
    monkeypatch.setattr(stepwise, "sample", lambda *_: next(said))
    out = tmp_path / "needle.json"
    arguments = [str(quantized), "--lengths", "400", "--depths", "0,100", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["needle.py", *arguments])
    bench.main()
    content = json.loads(out.read_text())
    assert (content["found"], content["asked"], content["max_context"]) == (1, 2, 512)
    rows = [Row(**row) for row in content["rows"]]
    assert [(row.depth, row.found, row.answer) for row in rows] == [
        (0, True, number),
        (100, False, "no"),
    ]
    table = "| tokens | 0% deep | 100% deep |\n|---|---|---|\n| 400 | 1 of 1 | 0 of 1 |\n"
    assert capsys.readouterr().out.endswith(table)


def test_a_length_beyond_the_model_is_refused(quantized: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["needle.py", str(quantized), "--lengths", "1k"])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 1
    assert "hint: give `--lengths 448` or less" in capsys.readouterr().err
