"""Knows the tests of a benchmark, each on an open engine: a prompt, an answer, several answers.

Prompts are random tokens and answers do not end by themselves: what a step costs depends on how
many experts it asks for, not on what the text says. Which ones it asks for does depend on that, so
hit rates are those of random prompts.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moecli.bench_result import Run
from moecli.config import SamplingConfig
from moecli.engine import Engine
from moecli.errors import MoecliError
from moecli.events import Finished, GenerationStats, PrefillProgress
from moecli.roofline import allowed_tok_s, decode_traffic
from moecli.sampler import new_generator, sample
from offload.hardware import Machine
from offload.stats import CacheStats

Named = tuple[str, Run]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how often."""

    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 5  # of every test, with warm experts
    cold: int = 1  # times that prompt and answer begin with nothing in memory
    sequences: tuple[int, ...] = ()  # counts of answers that are written together

    def __post_init__(self) -> None:
        for name, value, least in (
            ("pp", self.prompt_tokens, 1),
            ("tg", self.new_tokens, 1),
            ("repeats", self.repeats, 1),
            ("cold", self.cold, 0),
            ("sequences", min(self.sequences, default=1), 1),
        ):
            if value < least:
                raise MoecliError(f"`--{name}` must be at least {least}, not {value}", exit_code=2)

    @property
    def num_runs(self) -> int:
        """Those that warm up included."""
        return 2 * self.cold + (1 + self.repeats) * (2 + len(self.sequences))


class BenchTests:
    """The tests of one open engine."""

    def __init__(
        self,
        engine: Engine,
        config: BenchConfig,
        sampling: SamplingConfig,
        machine: Callable[[], Machine],
        cancelled: Callable[[], bool],
        seed: int = 0,
    ) -> None:
        """`machine` is asked before each answer how fast memory is at that moment.

        `seed` decides all tokens; no two prompts or answers are alike.
        """
        _check(engine, config)
        self._engine, self._config, self._cancelled = engine, config, cancelled
        self._sampling = replace(sampling, stop=(), ignore_eos=True)
        self._random = random.Random(seed)
        self._machine = machine
        self.peak_vram_nbytes: int | None = None

    def all_tests(self) -> Iterator[Named]:
        yield self.prompt()
        yield self.answer()
        for count in self._config.sequences:
            yield self.answers(count)

    def prompt(self) -> Named:
        """A prompt, to its first token."""
        count = self._config.prompt_tokens
        before = self._engine.expert_stats()
        stats, _ = self._generate(count, max_tokens=1)
        counted = self._engine.expert_stats() - before
        moved = (counted.disk_nbytes + counted.device_nbytes) / count
        run = Run(stats.prefill_tok_s, counted.hit_rate, moved, stats.ttft_s)
        return f"pp{count}", run

    def answer(self) -> Named:
        """An answer to a prompt of one token, from its first token on."""
        steps, machine = self._config.new_tokens, self._machine()
        stats, counted = self._generate(1, max_tokens=steps + 1)
        assert stats.generated_tokens == steps + 1, "an answer that ended too early"
        return f"tg{steps}", self._decoded(stats.decode_tok_s, counted, steps, steps, machine)

    def answers(self, count: int) -> Named:
        """So many answers at once, a token of each in every step."""
        steps, machine = self._config.new_tokens, self._machine()
        engine = self._engine
        sessions = [engine.new_session() for _ in range(count)]
        generators = [new_generator(self._seed()) for _ in range(count)]
        logits = engine.step(sessions, [[token] for token in self._tokens(count)])  # [S, V]
        before, begin = engine.expert_stats(), time.perf_counter()
        for _ in range(steps):
            rows = zip(logits, generators, strict=True)
            drawn = [sample(row, self._sampling, generator) for row, generator in rows]
            logits = engine.step(sessions, [[token] for token in drawn])
            if self._cancelled():
                raise KeyboardInterrupt
        seconds = time.perf_counter() - begin
        counted, tokens = engine.expert_stats() - before, steps * count
        run = self._decoded(tokens / seconds, counted, steps, tokens, machine)
        return f"tg{steps} x{count}", run

    def _decoded(
        self, tok_s: float, counted: CacheStats, steps: int, tokens: int, machine: Machine
    ) -> Run:
        traffic = decode_traffic(self._engine.plan, counted, steps, tokens)
        return Run(
            tok_s,
            counted.hit_rate,
            traffic.moved,
            read_nbytes=traffic.ram + traffic.vram,
            allowed_tok_s=allowed_tok_s(traffic, machine),
            traffic=traffic,
        )

    def _generate(self, prompt: int, max_tokens: int) -> tuple[GenerationStats, CacheStats]:
        """Numbers of an answer as the product gives it, and what was counted after its prompt."""
        engine = self._engine
        sampling = replace(self._sampling, max_tokens=max_tokens, seed=self._seed())
        session, counted = engine.new_session(), engine.expert_stats()
        for event in engine.generate(session, self._tokens(prompt), sampling, self._cancelled):
            match event:
                case PrefillProgress(done, total) if done == total:
                    counted = engine.expert_stats()
                case Finished(reason="cancelled"):
                    raise KeyboardInterrupt
                case Finished():
                    self.peak_vram_nbytes = event.stats.peak_vram_nbytes
                    return event.stats, engine.expert_stats() - counted
        raise AssertionError("a generation ends with Finished")

    def _seed(self) -> int:
        return self._random.randrange(1 << 31)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._engine.spec.vocab_size) for _ in range(count)]


def _check(engine: Engine, config: BenchConfig) -> None:
    """Raises MoecliError where this engine cannot take the tests."""
    needed = max(config.prompt_tokens + 1, config.new_tokens + 2)
    if needed > engine.ctx:
        raise MoecliError(
            f"the tests need a context of {needed} tokens; this one holds {engine.ctx}",
            f"give `--ctx {needed}`, or shorter tests with `--pp` and `--tg`",
        )
    if engine.plan.on_device and max(config.sequences, default=1) > 1:
        raise MoecliError(
            "on a graphics card there is one KV cache, so answers cannot be written together",
            "leave out `--sequences`, or measure the processor with `--device cpu`",
        )
