"""Tokens and text, streaming, chat templates: against the tokenizers library and transformers."""

import json
import random
import re
import time

import pytest

from moecli.errors import MoecliError
from moecli.tokenizer import Tokenizer

TEXT = "Hello, wörld! 你好 👩‍🚀🎉 naïve café, done.  Two  spaces\n\nnew line\ttab"
SPECIAL = ["<|bos|>", "<|eot|>", "<|start|>", "<|end|>"]
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|start|>system<|end|>' + strftime_now('%Y') + '<|eot|>' }}
    {%- endif %}
    {% if message.skip %}{% continue %}{% endif %}
<|start|>{{ message.role }}<|end|>
    {% generation %}
{{ message.content | trim }}{{ message | tojson if message.extra }}{{ eos_token }}
    {% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}
"""
MESSAGES = [
    {"role": "user", "content": "  Grüße <b>&</b> 'quotes' "},
    {"role": "assistant", "content": "left out", "skip": True},
    {"role": "user", "content": "two\nlines", "extra": ["ä", "<"]},
]


def byte_level():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the new line of the world"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return backend


def byte_fallback():
    """As Mixtral has it: words that begin with a mark, bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [chr(c) for c in range(33, 127)] + ["▁"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


def write(directory, backend=None, **files):
    (backend or byte_level()).save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": {"content": "<|eot|>"},
        "chat_template": TEMPLATE,
    }
    files = {"tokenizer_config.json": config} | {
        name.replace("__", "."): value for name, value in files.items()
    }
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    return Tokenizer.open(write(tmp_path, KINDS[request.param]()))


def stream(tokenizer, ids):
    detokenizer = tokenizer.detokenizer()
    return [detokenizer.add(token) for token in ids], detokenizer.finish()


def test_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()


def test_special_adds_what_the_model_wants_around_a_text(tmp_path):
    tokenizer = Tokenizer.open(write(tmp_path))
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", special=True) == [0, *plain]
    assert tokenizer.encode("<|start|>hello") == [2, *plain]
    assert tokenizer.decode([0, *plain]) == "hello"
    assert tokenizer.decode([0, *plain], skip_special=False) == "<|bos|>hello"


def test_streaming_gives_whole_characters(tokenizer):
    pieces, rest = stream(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert rest == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "no character was split: the test tests nothing"


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    detokenizer = tokenizer.detokenizer()
    for token in tokenizer.encode("a 🎉b"):
        text = detokenizer.add(token)
    assert text == "b"


def test_markup_is_printed_and_what_begins_or_ends_a_text_is_not(tokenizer):
    ids = tokenizer.encode("hello world")
    for cut in range(len(ids)):
        pieces, rest = stream(tokenizer, [0, *ids[:cut], 2, *ids[cut:], 3, 1])
        said = tokenizer.decode(ids[:cut])
        assert "".join(pieces) + rest == f"{said}<|start|>{'hello world'[len(said) :]}<|end|>"


def test_markup_is_whole_after_half_a_character(tokenizer):
    pieces, _ = stream(tokenizer, [*tokenizer.encode("so 🎉")[:-1], 2, 3])
    assert "".join(pieces).replace("\ufffd", "") == "so <|start|><|end|>"


@pytest.mark.parametrize(
    ("held", "text", "kept"),
    [
        ("<|start|>a<|end|>hello", "<|start|>a<|end|>hello world", None),  # all
        ("<|start|>a<|end|>hello there", "<|start|>a<|end|>hello world", 2),
        ("<|start|>a<|end|>b<|start|>c", "<|start|>a<|end|>b<|end|>", 2),
        ("<|start|>a<|end|>b", "<|start|>b", 0),
        ("<|start|>hello<|end|>b", "<|start|>hello<|end|>world", 6),
        ("hello", "world", 0),
        ("", "hello", 0),
    ],
)
def test_what_is_held_is_not_encoded_anew(tmp_path, held, text, kept):
    """`held` as it could be generated: a letter a token."""
    tokenizer = Tokenizer.open(write(tmp_path))
    parts = [part for part in re.split(r"(<.*?>)", held) if part]
    tokens = [
        token
        for part in parts
        for piece in ([part] if part.startswith("<") else part)
        for token in tokenizer.encode(piece)
    ]
    found = tokenizer.encode_after(tokens, text)
    assert tokenizer.decode(found, skip_special=False) == text
    kept = len(tokens) if kept is None else kept
    assert found[:kept] == tokens[:kept]
    assert found[kept:] == tokenizer.encode(text[len(tokenizer.decode(tokens[:kept], False)) :])


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("so 🎉")
    pieces, rest = stream(tokenizer, ids[:-1])
    assert "".join(pieces) == "so "
    assert rest == tokenizer.decode(ids[:-1])[len("so ") :]
    assert set(rest) == {"\ufffd"}
    assert stream(tokenizer, [])[1] == ""


@pytest.mark.parametrize("seed", range(20))
def test_streams_of_random_tokens_add_up(tokenizer, seed):
    """Bytes in any order: mostly no UTF-8 at all, and nothing is lost, doubled or held for long."""
    rng = random.Random(seed)
    letters = tokenizer.encode("x🎉é你 y")
    ids = []
    for _ in range(40):
        start = rng.randrange(len(letters))
        ids += letters[start : start + rng.randrange(1, 6)]
    pieces, rest = stream(tokenizer, ids)
    found = "".join(pieces) + rest
    if tokenizer.backend.token_to_id("<0x00>") is None:
        assert found == tokenizer.decode(ids)
    else:  # this decoder gives up whole runs of bytes, of which streaming has shown the good part
        assert found.replace("\ufffd", "").replace("🎉", "").strip("xéy你 ").isprintable()
        assert tokenizer.decode(ids).count(" ") == found.count(" ")
    assert all(any(pieces[i : i + 5]) for i in range(len(pieces) - 5))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_template_renders_as_in_transformers(tmp_path, add_generation_prompt):
    from transformers import AutoTokenizer

    directory = write(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.open(directory).render(MESSAGES, add_generation_prompt)
    library = AutoTokenizer.from_pretrained(directory)
    expected = library.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert found == expected
    assert found.startswith("<|bos|>")
    assert time.strftime("%Y") in found
    assert "<b>&</b>" in found
    assert '["ä", "<"]' in found
    assert "left out" not in found
    ids = library(expected, add_special_tokens=False)["input_ids"]
    assert Tokenizer.open(directory).encode(found) == ids


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": {}, "chat_template__jinja": "T {{ messages[0].content }}"},
        {
            "tokenizer_config__json": {},
            "chat_template__json": {"chat_template": "T {{ messages[0].content }}"},
        },
        {"tokenizer_config__json": {"chat_template": "T {{ messages[0].content }}"}},
        {
            "tokenizer_config__json": {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "T {{ messages[0].content }}"},
                ]
            }
        },
        {
            "tokenizer_config__json": {"chat_template": "old"},
            "chat_template__jinja": "T {{ messages[0].content }}",
        },
    ],
)
def test_places_of_a_template(tmp_path, files):
    tokenizer = Tokenizer.open(write(tmp_path, **files))
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "T x"


def test_no_template_is_said_with_a_way_out(tmp_path):
    tokenizer = Tokenizer.open(write(tmp_path, tokenizer_config__json={}))
    with pytest.raises(MoecliError, match="no chat template") as caught:
        tokenizer.render([{"role": "user", "content": "x"}])
    assert "run --raw" in caught.value.hint


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ nothing.there }}", "refuses"),
    ],
)
def test_a_template_that_refuses(tmp_path, template, complaint):
    tokenizer = Tokenizer.open(write(tmp_path, chat_template__jinja=template))
    with pytest.raises(MoecliError, match=complaint):
        tokenizer.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"tokenizer__json": "{"}, "tokenizer.json` cannot be read"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json` cannot be read"),
        ({"generation_config__json": "[]"}, "holds no JSON object"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, complaint):
    with pytest.raises(MoecliError, match=complaint):
        Tokenizer.open(write(tmp_path, **files))


def test_no_tokenizer_is_said(tmp_path):
    with pytest.raises(MoecliError, match=r"no tokenizer\.json"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "generation_config__json": {"eos_token_id": [1, 3]},
                "config__json": {"eos_token_id": 2},
            },
            {1, 3},
        ),
        ({"generation_config__json": {}, "config__json": {"eos_token_id": 2}}, {2}),
        ({"config__json": {"text_config": {"eos_token_id": [2, 3]}}}, {2, 3}),
        ({}, {1}),
        ({"tokenizer_config__json": {}}, set()),
    ],
)
def test_tokens_that_end_an_answer(tmp_path, files, expected):
    assert Tokenizer.open(write(tmp_path, **files)).eos_ids == expected
