"""Answers with reasoning and tool calls: what is printed, what the next turn's prompt says.

The models are random; what they say is scripted, token by token, by the real tokenizer.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecli import stepwise
from moecli.config import EngineConfig, SamplingConfig
from moecli.conversion import quantize_model
from moecli.engine import Engine
from moecli.slash import run_command
from moecli.talk import Talk
from moecli.tokenizer import Tokenizer
from quant.scheme import QuantScheme
from tests.commands import Command
from tests.e2e import reasoning, tiny
from tests.models.families import FAMILIES
from tests.models.tiny_models import oracle

Script = Callable[..., None]
FINAL = "<|channel|>final<|message|>"
THOUGHT = "<|channel|>analysis<|message|>"
FIRST = f"{THOUGHT}It is short.<|end|><|start|>assistant{FINAL}Hello!<|return|>"
CALL = (
    f"{THOUGHT}I ask.<|end|><|start|>assistant to=functions.clock<|channel|>commentary "
    '<|constrain|>json<|message|>{"zone": "UTC"}<|call|>'
)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss, windows of 8 tokens, that speaks harmony."""
    root = tmp_path_factory.mktemp("gpt-oss")
    model = oracle("gpt_oss", **(FAMILIES["gpt_oss"].wide | {"vocab_size": tiny.VOCAB}))
    model.bfloat16().save_pretrained(root / "source")
    tiny.write_tokenizer(
        root / "source",
        reasoning.HARMONY_SPECIALS,
        reasoning.HARMONY_TEMPLATE,
        reasoning.HARMONY_STOPS,
    )
    quantize_model(root / "source", root / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    return root / "out"


@pytest.fixture(scope="module", params=[False, True], ids=["", "begun"])
def thinking(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A tiny Qwen3-MoE that thinks; with `begun` its prompt begins the reasoning."""
    root = tmp_path_factory.mktemp("thinking")
    tiny.write_checkpoint(root / "source", tiny.qwen3_config(), tiny.qwen3_tensors())
    tiny.write_tokenizer(
        root / "source",
        reasoning.THINK_SPECIALS,
        reasoning.think_template(request.param),
        reasoning.THINK_STOPS,
        reasoning.THINK_TEXTS,
    )
    quantize_model(root / "source", root / "out", QuantScheme(4, 32), QuantScheme(8, 32))
    return root / "out"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Lets a model say these texts, one after the other."""

    def say(model: Path, *answers: str) -> None:
        tokenizer = Tokenizer.open(model)
        tokens = iter([token for answer in answers for token in tokenizer.encode(answer)])
        monkeypatch.setattr(stepwise, "sample", lambda *_: next(tokens))

    return say


def test_run_prints_the_answer_and_json_has_the_reasoning_apart(
    moecli: Command, gpt_oss: Path, script: Script
) -> None:
    script(gpt_oss, FIRST, FIRST, FIRST)
    plain = moecli("run", gpt_oss, "Hi")
    assert (plain.code, plain.out, plain.err) == (0, "Hello!\n", "")
    content = json.loads(moecli("run", gpt_oss, "Hi", "--json").out)
    assert (content["text"], content["reasoning"]) == ("Hello!", "It is short.")
    raw = moecli("run", gpt_oss, "Hi", "--raw")
    assert raw.out == FIRST.removesuffix("<|return|>") + "\n", "markup is left as it is"


def test_a_tool_call_is_printed_as_it_was_written(
    moecli: Command, gpt_oss: Path, script: Script
) -> None:
    script(gpt_oss, CALL)
    call = CALL.partition("<|end|>")[2].removesuffix("<|call|>")
    assert moecli("run", gpt_oss, "Hi").out == call + "\n"


def test_an_answer_that_never_began_is_explained(
    moecli: Command, gpt_oss: Path, script: Script
) -> None:
    script(gpt_oss, FIRST)
    outcome = moecli("run", gpt_oss, "Hi", "-n", "14")
    assert (outcome.code, outcome.out) == (0, "")
    assert "before the answer began" in outcome.err


@pytest.mark.parametrize("flags", [(), ("--stop", "lo")])
def test_thinking_in_the_text_is_kept_apart(
    moecli: Command, thinking: Path, script: Script, flags: tuple[str, ...]
) -> None:
    begun = "<think>\\n" in Tokenizer.open(thinking).template.source
    begin = "" if begun else "<think>\n"
    answer = f"{begin}Short.\n</think>\n\nHello!<|im_end|>"
    said = "Hel" if flags else "Hello!"
    script(thinking, answer)
    assert moecli("run", thinking, "Hi", *flags).out == said + "\n"
    script(thinking, answer)
    content = json.loads(moecli("run", thinking, "Hi", "--json", *flags).out)
    assert (content["text"], content["reasoning"]) == (said, "Short.")


class Prompts(list[str]):
    """What an engine was asked, as text, and how many tokens of it were cached."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        encode = engine.encode_chat

        def recorded(*args):
            token_ids = encode(*args)
            self.append(engine.tokenizer.decode(token_ids, skip_special=False))
            return token_ids

        monkeypatch.setattr(engine, "encode_chat", recorded)


GREEDY = SamplingConfig(0)
SYSTEM = "<|start|>system<|message|>Reasoning: medium<|end|>"


def test_a_talk_tells_the_template_of_gpt_oss_what_it_wants(
    gpt_oss: Path, script: Script, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    second = f"{FINAL}And you?<|return|>"
    script(gpt_oss, FIRST, second, CALL, second)
    with Engine.open(gpt_oss, EngineConfig(ctx=512, kernels="reference")) as engine:
        prompts, talk = Prompts(engine, monkeypatch), Talk(engine, GREEDY, "Be brief.")
        cached = []
        for question in ("Hi", "Ho", "Time?", "Well?"):
            talk.say(question)
            assert talk.last is not None
            cached.append(talk.last.cached_tokens)
        turns = [turn["content"] for turn in talk.conversation.turns[1::2]]
        lengths = [len(engine.tokenizer.encode(prompt)) for prompt in prompts]
    assert turns[0] == FIRST.removesuffix("<|return|>"), "a chat is kept as it was said"
    assert capfd.readouterr().out.splitlines()[:2] == ["Hello!", "And you?"]

    def user(text: str) -> str:
        return f"<|start|>user<|message|>{text}<|end|><|start|>assistant"

    expected = [f"{SYSTEM}<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"]
    expected[0] += user("Hi")
    expected.append(expected[0] + f"{FINAL}Hello!<|end|>" + user("Ho"))
    expected.append(expected[1] + f"{FINAL}And you?<|end|>" + user("Time?"))
    kept_call = CALL.replace("commentary <|constrain|>json", "commentary json")
    expected.append(expected[2] + kept_call + user("Well?"))
    assert prompts == expected
    # All of a prompt stays in the KV cache, and of an answer what the template repeats.
    assert cached[0] == 0
    assert cached[1] == lengths[0], "what followed was dropped, and the windows had moved on"
    assert cached[2] == lengths[1] + len("finalAnd you?") + 2
    assert cached[3] == lengths[2], "the template writes a call in its own way"


def test_windows_that_come_back_answer_as_if_all_were_computed(gpt_oss: Path) -> None:
    sampling = SamplingConfig(0, max_tokens=30, ignore_eos=True)
    with Engine.open(gpt_oss, EngineConfig(ctx=512, kernels="reference")) as engine:
        session, first = engine.new_session(), engine.encode_text("a prompt beyond one window")
        list(engine.generate(session, first, sampling))
        for follow in ("and another", ""):
            prompt = first + engine.encode_text(follow)
            last = list(engine.generate(session, prompt, sampling))[-1]
            fresh = engine.new_session()
            assert last.text == list(engine.generate(fresh, prompt, sampling))[-1].text
            assert session.tokens == fresh.tokens
            assert last.stats.cached_tokens == (len(first) if follow else 0)


def test_a_talk_leaves_the_thoughts_in_the_text_to_the_template(
    thinking: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "<think>\\n" in Tokenizer.open(thinking).template.source
    begin = "" if begun else "<think>\n"
    answer = f"{begin}Short.\n</think>\n\nHello!<|im_end|>"
    script(thinking, answer, answer)
    with Engine.open(thinking, EngineConfig(ctx=512, kernels="reference")) as engine:
        prompts, talk = Prompts(engine, monkeypatch), Talk(engine, GREEDY, None)
        talk.say("Hi")
        talk.say("Ho")
        assert talk.last is not None
        cached = talk.last.cached_tokens
    history = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    opened = "<think>\n" if begun else ""
    assert prompts == [
        history + opened,
        f"{history}Hello!<|im_end|>\n<|im_start|>user\nHo<|im_end|>\n<|im_start|>assistant\n{opened}",
    ]
    assert cached == len(Tokenizer.open(thinking).encode(history))


def test_an_answer_stopped_in_its_thoughts_is_taken_back(
    gpt_oss: Path, script: Script, capfd
) -> None:
    script(gpt_oss, FIRST)
    with Engine.open(gpt_oss, EngineConfig(ctx=512, kernels="reference")) as engine:
        talk = Talk(engine, SamplingConfig(0, max_tokens=14), None)
        talk.say("Hi")
        assert talk.conversation.turns == []
    assert "the question is taken back" in capfd.readouterr().err


NO_SYSTEM = """
{%- for message in messages %}
    {%- if message.role == 'system' %}REFUSE{% endif %}
    {{- '<|header_start|>' + message.role + '<|header_end|>' + message.content + '<|eot|>' }}
{%- endfor %}
"""


@pytest.mark.parametrize(
    "refusal", ["{{ raise_exception('no system role') }}", "{% continue %}", ""]
)
def test_a_system_prompt_reaches_a_model_whose_template_has_no_such_role(
    tmp_path: Path, refusal: str
) -> None:
    source, out = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "out"
    tiny.write_tokenizer(source, template=NO_SYSTEM.replace("REFUSE", refusal))
    quantize_model(source, out, QuantScheme(4, 32), QuantScheme(8, 32))
    notes: list[str] = []
    with Engine.open(out, EngineConfig(ctx=256), notify=notes.append) as engine:
        talk = Talk(engine, SamplingConfig(0, max_tokens=2), None)
        run_command(talk, "/system Be brief.")
        talk.conversation.ask("Hi")
        for _ in range(2):
            ids = engine.encode_chat(talk.conversation.messages, talk.session)
        prompt = engine.tokenizer.decode(ids, skip_special=False)
    merged = "<|header_start|>user<|header_end|>Be brief.\n\nHi<|eot|>"
    system = "<|header_start|>system<|header_end|>Be brief.<|eot|>"
    assert prompt == (merged if refusal else system + merged.replace("Be brief.\n\n", ""))
    assert sum("no system role" in note for note in notes) == bool(refusal)
