"""Knows the tokenizer and the chat format: byte-level BPE, digits singly, newlines split first.

Newlines must be a piece of their own: with GPT-2's pattern the blank line that ends a prompt is cut
otherwise than the same blank line before text, and the model would never have seen its own prompt.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, END, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"
SPECIALS = [BOS, END, HEADER_START, HEADER_END, "<|eom|>", EOT, "<|step|>", PAD]
SPECIALS += [f"<|reserved_{i}|>" for i in range(8)]

CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def render(document: dict) -> str:
    """A document as one string with its special tokens, as the chat template writes it."""
    if "text" in document:
        return BOS + document["text"] + END
    turns = (
        f"{HEADER_START}{m['role']}{HEADER_END}\n\n{m['content'].strip()}{EOT}"
        for m in document["messages"]
    )
    return BOS + "".join(turns)


def contents(document: dict) -> Iterable[str]:
    if "text" in document:
        yield document["text"]
    for message in document.get("messages", ()):
        yield message["role"]
        yield message["content"]


def train_tokenizer(documents: Iterable[dict], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((c for d in documents for c in contents(d)), trainer)
    assert tokenizer.get_vocab_size() == vocab_size - len(SPECIALS), (
        "too little text for the vocabulary"
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))
