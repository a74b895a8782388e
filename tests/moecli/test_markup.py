"""Reasoning apart from text, whatever the pieces in which an answer arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecli.markup import Harmony, Markup, Plain, Thinking, joined, markup_of

HARMONY_ANSWER = (
    "<|channel|>analysis<|message|>hm < hm<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes, 1 < 2.<|return|>"
)
CALL = (
    "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant to=functions.weather"
    '<|channel|>commentary <|constrain|>json<|message|>{"city": "Rome"}<|call|>'
)


def divided(markup: Markup, answer: str, prompt: str = "", cuts: tuple[int, ...] = ()):
    """(reasoning, text) of an answer that arrives in pieces, cut at these places."""
    splitter = markup.splitter(prompt)
    pieces = []
    for begin, end in zip((0, *cuts), (*cuts, len(answer)), strict=True):
        pieces += splitter.feed(answer[begin:end])
    pieces += splitter.finish()
    assert all(piece.text for piece in pieces)
    return joined(pieces, "reasoning"), joined(pieces, "text")


CASES = [
    (Plain(), "", " <think>a</think> ", "", " <think>a</think> "),
    (Thinking(), "", "<think>\nhm\n</think>\n\nYes.\n", "hm", "Yes.\n"),
    (Thinking(), "", "\n <think>hm < h </ m</think>Yes", "hm < h </ m", "Yes"),
    (Thinking(), "<|a|><think>\n", "hm\n</think>\n\nYes", "hm", "Yes"),
    (Thinking(), "<|a|><think>\n\n</think>\n\n", " Yes", "", " Yes"),
    (Thinking(), "", "  Yes <think>no</think>", "", "  Yes <think>no</think>"),
    (Thinking(), "", "<think>cut off </th", "cut off </th", ""),
    (Thinking(), "", "<think></think>Yes", "", "Yes"),
    (Thinking(), "", "<thin", "", "<thin"),
    (Thinking(), "", "<think>a</think><tool_call>{}</tool_call>", "a", "<tool_call>{}</tool_call>"),
    (Harmony(), "", HARMONY_ANSWER, "hm < hm", "Yes, 1 < 2."),
    (Harmony(), "", HARMONY_ANSWER.removesuffix("<|return|>"), "hm < hm", "Yes, 1 < 2."),
    (Harmony(), "", "<|channel|>final<|message|>Yes<|", "", "Yes<|"),
    (Harmony(), "", "<|channel|>analysis<|message|>cut off", "cut off", ""),
    (Harmony(), "", "<|channel|>anal", "", ""),
    (Harmony(), "", "Yes", "", "Yes"),
    (Harmony(), "", " to be", "", " to be"),
    (Harmony(), "", " to", "", " to"),
    (
        Harmony(),
        "",
        "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>analysis"
        "<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Then.",
        "a\n\nb",
        "First.\n\nThen.",
    ),
    (
        Harmony(),
        "",
        CALL,
        "I look it up.",
        "<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Rome"}',
    ),
    (
        Harmony(),
        "",
        " to=functions.f<|channel|>commentary json<|message|>{}",
        "",
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}",
    ),
    (
        Harmony(),
        "",
        "<|channel|>analysis to=python code<|message|>1 + 1",
        "",
        "<|start|>assistant<|channel|>analysis to=python code<|message|>1 + 1",
    ),
]


@pytest.mark.parametrize(("markup", "prompt", "answer", "reasoning", "text"), CASES)
@given(data=st.data())
def test_an_answer_is_divided(markup, prompt, answer, reasoning, text, data) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(answer) - 1)))
    assert divided(markup, answer, prompt, tuple(sorted(cuts))) == (reasoning, text)


@pytest.mark.parametrize("markup", [Thinking(), Harmony()])
def test_text_comes_as_soon_as_it_is_certain(markup: Markup) -> None:
    head = "<think>a</think>" if isinstance(markup, Thinking) else HARMONY_ANSWER.partition("Y")[0]
    splitter = markup.splitter("")
    assert joined(splitter.feed(head + "Yes"), "text") == "Yes"
    assert joined(splitter.feed(" 1"), "text") == " 1"


def test_what_the_template_of_gpt_oss_is_told() -> None:
    fields = Harmony().fields
    assert fields(HARMONY_ANSWER) == {"content": "Yes, 1 < 2.", "thinking": "hm < hm"}
    assert fields("Yes") == {"content": "Yes"}
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    assert fields(CALL) == {
        "content": "",
        "thinking": "I look it up.",
        "tool_calls": [{"type": "function", "function": call}],
    }
    cut_off = fields(CALL.partition("Rome")[0])
    assert cut_off["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_templates_that_know_think_are_told_the_whole_answer() -> None:
    answer = "<think>hm</think>Yes"
    assert Thinking().fields(answer) == Plain().fields(answer) == {"content": answer}


@pytest.mark.parametrize(
    ("names", "template", "kind"),
    [
        ({"<|channel|>", "<|message|>"}, "", Harmony),
        ({"<think>", "</think>"}, "", Thinking),
        (set(), "{{ content.split('</think>')[-1] }}", Thinking),
        ({"<|message|>"}, "", Plain),
    ],
)
def test_the_markup_of_a_model_is_known_by_its_tokens_and_template(names, template, kind) -> None:
    assert type(markup_of(names.__contains__, template)) is kind
