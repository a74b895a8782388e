"""Does a model find one sentence in a long text? By how long the text is and how deep the sentence.

    python benchmarks/needle.py MODEL [--lengths 1k,2k,4k] [--depths 0,50,100] [--json FILE]

MODEL is a directory, a name of `moecli list`, or `demo`. The text is made of fixed words, without a
network, and is the same for all models; the sentence tells a number of a city, and the question
asks for it. A model with a chat template is asked in a chat; `--raw` has it complete the sentence
instead. An answer counts where its text, reasoning left out, names the number. Greedy. Prints a
Markdown table of the share found; `--json` writes every answer. docs/long-context.md.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moecli import ui
from moecli.answering import Answer, NoWriter, stream_answer
from moecli.commands.opening import model_directory, open_engine
from moecli.config import EngineConfig, SamplingConfig
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.markup import Plain
from moecli.models.facts import read_facts
from moecli.session import Session
from moecli.units import parse_count
from offload.errors import OffloadError
from quant.checkpoint import read_json
from quant.errors import QuantError

DEPTHS = (0, 25, 50, 75, 100)  # percent of the text that stands before the needle
SHORTEST, LONGEST = 1024, 131072  # of the lengths that are tried unless they are given
ANSWER_TOKENS = 64
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Dakar", "Perth", "Minsk", "Tunis", "Bern")
_WHO = ("The gardener", "A neighbour", "The old captain", "My sister", "The baker", "A student")
_DID = ("walked along", "looked at", "wrote about", "painted", "repaired", "remembered")
_WHAT = ("the stone bridge", "the river", "a wooden boat", "the market", "the garden wall")
_WHEN = ("in the morning", "before the rain", "at noon", "late in autumn", "without a word")


@dataclass(frozen=True)
class Needle:
    city: str
    number: int

    @property
    def sentence(self) -> str:
        return f"{self.opening} {self.number}."

    @property
    def opening(self) -> str:
        return f"The secret number of {self.city} is"

    @property
    def question(self) -> str:
        return f"What is the secret number of {self.city}? Answer with the number alone."

    def is_in(self, answer: str) -> bool:
        """Whether it names the number, by itself; `12 345` and `12,345` are 12345."""
        joined = re.sub(r"(?<=\d)[ ,](?=\d{3}\b)", "", answer)
        return str(self.number) in re.findall(r"\d+", joined)


@dataclass(frozen=True)
class Row:
    """One question; `depth` in percent, `tokens` of the whole prompt."""

    length: int
    depth: int
    tokens: int
    cached_tokens: int
    expected: int
    found: bool
    answer: str
    finish_reason: str
    ttft_s: float


def needle(seed: int) -> Needle:
    rng = random.Random(seed)
    return Needle(CITIES[seed % len(CITIES)], rng.randrange(10_000, 100_000))


def filler(seed: int) -> Iterator[str]:
    """Sentences without numbers and without cities, for ever."""
    rng = random.Random(seed)
    while True:
        yield " ".join(map(rng.choice, (_WHO, _DID, _WHAT, _WHEN))) + "."


def haystack(sentences: Sequence[str], hidden: Needle, depth: int) -> str:
    """The text, with the needle after `depth` percent of the sentences."""
    place = round(len(sentences) * depth / 100)
    return " ".join([*sentences[:place], hidden.sentence, *sentences[place:]])


class Prompts:
    """Makes prompts of a given length for one model."""

    def __init__(self, engine: Engine, raw: bool) -> None:
        self._engine, self._raw = engine, raw

    def encode(self, text: str, hidden: Needle, session: Session | None = None) -> list[int]:
        if self._raw:
            return self._engine.encode_text(f"{text}\n\n{hidden.opening}")
        asked = f"{text}\n\n{hidden.question}"
        return self._engine.encode_chat([{"role": "user", "content": asked}], session)

    def sentences(self, length: int, hidden: Needle, seed: int) -> list[str]:
        """As many as go into a prompt of `length` tokens; raises MoecliError where none does."""
        source = filler(seed)
        found = [next(source) for _ in range(length)]  # no sentence is one token
        low, high = 0, length
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.encode(haystack(found[:middle], hidden, 100), hidden)) <= length
            low, high = (middle, high) if fits else (low, middle - 1)
        if not low:
            raise MoecliError(f"{length} tokens hold no text around the needle", "give more")
        return found[:low]


def lengths_for(given: list[int] | None, max_context: int) -> list[int]:
    """Lengths of prompts that leave room for an answer; powers of two unless they are given.

    Raises MoecliError for one that the model cannot hold.
    """
    most = max_context - ANSWER_TOKENS
    if given is None:
        powers = [1 << n for n in range(SHORTEST.bit_length() - 1, LONGEST.bit_length())]
        return [length for length in powers if length <= most] or [most]
    if beyond := [length for length in given if length > most]:
        raise MoecliError(
            f"{beyond[0]} tokens are too many: the model's context is {max_context}, and an answer "
            f"takes {ANSWER_TOKENS}",
            f"give `--lengths {most}` or less",
        )
    return given


def measure(
    engine: Engine, lengths: Sequence[int], depths: Sequence[int], repeats: int, raw: bool
) -> Iterator[Row]:
    """Every length, needle and depth, until Ctrl-C."""
    prompts = Prompts(engine, raw)
    for length in lengths:
        session = engine.new_session()  # what the KV cache holds of a text is not read again
        for seed in range(repeats):
            hidden = needle(seed)
            sentences = prompts.sentences(length, hidden, seed)
            for depth in depths:
                ids = prompts.encode(haystack(sentences, hidden, depth), hidden, session)
                answer = ask(engine, session, ids, raw)
                finished, text = answer.finished, answer.text.strip()
                if finished.reason == "cancelled":
                    return
                yield Row(
                    *(length, depth, len(ids), finished.stats.cached_tokens, hidden.number),
                    *(hidden.is_in(text), text, finished.reason, finished.stats.ttft_s),
                )


def ask(engine: Engine, session: Session, token_ids: list[int], raw: bool) -> Answer:
    sampling = SamplingConfig(0, max_tokens=ANSWER_TOKENS)
    return stream_answer(
        lambda cancelled: engine.generate(session, token_ids, sampling, cancelled),
        Plain().splitter("") if raw else engine.splitter(token_ids),
        NoWriter(),
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: lengths down, depths across, the share found in each cell."""
    depths = sorted({row.depth for row in rows})
    yield f"| tokens | {' | '.join(f'{depth}% deep' for depth in depths)} |"
    yield "|" + "---|" * (len(depths) + 1)
    for length in sorted({row.length for row in rows}):
        cells = []
        for depth in depths:
            here = [row.found for row in rows if (row.length, row.depth) == (length, depth)]
            cells.append(f"{sum(here)} of {len(here)}" if here else "")
        yield f"| {length} | {' | '.join(cells)} |"


def _counts(text: str) -> list[int]:
    return [parse_count(part, "`--lengths`") for part in text.split(",")]


def _percents(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a directory, a name of `moecli list`, or demo")
    parser.add_argument("--lengths", type=_counts, help="tokens of the prompts: 1k,8k,64k")
    parser.add_argument("--depths", type=_percents, default=DEPTHS, help="percent: 0,50,100")
    parser.add_argument("--repeats", type=int, default=1, help="needles for each cell")
    parser.add_argument("--raw", action="store_true", help="complete the sentence, without a chat")
    parser.add_argument("--kv-dtype", default="auto", help="auto, bf16 or int8")
    parser.add_argument("--json", type=Path, help="write every answer there")
    return parser.parse_args()


def main() -> None:
    try:
        _run(_options())
    except (MoecliError, OffloadError, QuantError) as error:
        ui.show_error(error.message, error.hint)
        raise SystemExit(1) from None


def _run(options: argparse.Namespace) -> None:
    path = model_directory(options.model)
    max_context = read_facts(read_json(path / "config.json")).max_context
    lengths = lengths_for(options.lengths, max_context)
    config = EngineConfig(ctx=max(lengths) + ANSWER_TOKENS, kv_dtype=options.kv_dtype)
    rows: list[Row] = []
    with open_engine(path, config, keep_usage=False) as engine:
        for row in measure(engine, lengths, options.depths, options.repeats, options.raw):
            rows.append(row)
            print(
                f"{row.length} tokens, {row.depth}% deep: {row.expected} "
                f"{'found' if row.found else 'not found'} in {row.answer!r}",
                flush=True,
            )
    print("\n" + "\n".join(table(rows)))
    if options.json is not None:
        content = {
            "model": options.model,
            "max_context": max_context,
            "raw": options.raw,
            "kv_dtype": options.kv_dtype,
            "found": sum(row.found for row in rows),
            "asked": len(rows),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
