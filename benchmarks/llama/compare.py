"""Knows how the two sides of a shape are made, and measured in alternation with memory itself."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.llama.shapes import Shape
from benchmarks.llama.workers import Worker
from offload.bandwidth import RamBlock, measure_ram

_PROBE = list(range(100, 148))  # a prompt whose logits both sides must agree about
_WARM_STEPS = 8
_TURNS = 24  # decoding and memory, in turn
_TURN_TOKENS = 16
_READ_NBYTES = 1 << 30  # for memory's bandwidth: servers have caches of hundreds of MiB


@dataclass(frozen=True)
class OurKind:
    """A model of moecli's by the schemes of experts and of everything else."""

    name: str
    scheme: str
    dense_scheme: str


@dataclass(frozen=True)
class TheirKind:
    """A GGUF, and how it is opened; `pure` gives every matrix the type's own bits."""

    quant: str
    repack: bool
    pure: bool

    @property
    def name(self) -> str:
        return f"{self.quant}, {'repacked' if self.repack else 'as stored'}"


@dataclass(frozen=True)
class Match:
    """Whom one of ours meets."""

    ours: OurKind
    theirs: tuple[TheirKind, ...]


def _both_ways(quant: str, pure: bool) -> tuple[TheirKind, ...]:
    return tuple(TheirKind(quant, repack, pure) for repack in (True, False))


_Q4_K_M = _both_ways("Q4_K_M", pure=False)
_FOUR_BITS = (*_both_ways("Q4_0", pure=True), *_Q4_K_M)
MATCHES = (
    Match(OurKind("int4", "int4-g32", "int4-g32"), _FOUR_BITS),
    # What `moecli quantize` writes unless told otherwise, beside what also has larger matrices.
    Match(OurKind("default", "int4", "int8"), _Q4_K_M),
    Match(OurKind("int4-g128", "int4-g128", "int4-g128"), _FOUR_BITS),
    Match(OurKind("int8", "int8-g128", "int8-g128"), _both_ways("Q8_0", pure=True)),
)


@dataclass(frozen=True)
class Settings:
    """How everything is run."""

    peer_python: str
    our_python: str
    work: Path
    threads: int
    kernels: str
    prompt_tokens: int
    new_tokens: int
    alternations: int
    sequences: tuple[int, ...]

    @property
    def ctx(self) -> int:
        return max(self.prompt_tokens + 8, self.new_tokens + 8, 512)

    def our_worker(self) -> Worker:
        return Worker(self.our_python, "benchmarks.llama.our_worker", self.work / "ours.log")

    def their_worker(self) -> Worker:
        return Worker(self.peer_python, "benchmarks.llama.peer_worker", self.work / "peer.log")


class Shop:
    """The models of one shape on the disk: made where they are missing, removed when asked."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self._folder = settings.work / shape.name
        self._folder.mkdir(parents=True, exist_ok=True)

    def our_path(self, kind: OurKind) -> Path:
        return self._folder / f"moecli-{kind.name}"

    def their_path(self, quant: str) -> Path:
        return self._folder / f"{quant}.gguf"

    def make(self, matches: Iterable[Match]) -> None:
        matches = list(matches)
        self._make_theirs({kind.quant: kind.pure for m in matches for kind in m.theirs})
        missing = [m.ours for m in matches if not self.our_path(m.ours).exists()]
        if missing:
            self._make_ours(missing)

    def _make_ours(self, kinds: Iterable[OurKind]) -> None:
        with self.settings.our_worker() as ours:
            for kind in kinds:
                ours.ask(
                    "make",
                    config=self.shape.config,
                    path=str(self.our_path(kind)),
                    scheme=kind.scheme,
                    dense_scheme=kind.dense_scheme,
                    threads=self.settings.threads,
                )

    def _make_theirs(self, quants: dict[str, bool]) -> None:
        """From one source of 16 bits, by llama.cpp's own quantizer; the source does not stay."""
        missing = {q: pure for q, pure in quants.items() if not self.their_path(q).exists()}
        if not missing:
            return
        source, partial = self._folder / "bf16.gguf", self._folder / "partial.gguf"
        with self.settings.their_worker() as peer:
            peer.ask("write", arch=self.shape.arch, config=self.shape.config, path=str(source))
            for quant, pure in missing.items():
                peer.ask(
                    "quantize",
                    source=str(source),
                    out=str(partial),
                    kind=quant,
                    pure=pure,
                    threads=self.settings.threads,
                )
                partial.rename(self.their_path(quant))
        source.unlink()


def compare(shop: Shop, match: Match) -> dict[str, Any]:
    """One of ours against each of its peers, one peer in memory at a time."""
    settings = shop.settings
    with ExitStack() as stack:
        ours = stack.enter_context(settings.our_worker())
        path = str(shop.our_path(match.ours))
        opened = ours.ask(
            "open", path=path, threads=settings.threads, ctx=settings.ctx, kernels=settings.kernels
        )
        _warm(ours, settings)
        meetings = [_meet(shop, ours, theirs) for theirs in match.theirs]
        return {
            "ours": match.ours.name,
            "schemes": {"experts": match.ours.scheme, "dense": match.ours.dense_scheme},
            "sizes": ours.ask("sizes", path=path),
            "opened": opened,
            "routing": ours.ask("routing", tokens=settings.ctx - 2),
            "peers": meetings,
            "together": _together(ours, settings),
            "beside_memory": _beside_memory(ours, settings),
        }


def _warm(worker: Worker, settings: Settings) -> None:
    """Brings weights into memory, and threads and buffers into being."""
    worker.ask("prefill", tokens=settings.prompt_tokens)
    worker.ask("decode", tokens=_WARM_STEPS)


def _meet(shop: Shop, ours: Worker, kind: TheirKind) -> dict[str, Any]:
    settings, path = shop.settings, str(shop.their_path(kind.quant))
    with settings.their_worker() as theirs:
        theirs.ask(
            "open", path=path, repack=kind.repack, threads=settings.threads, ctx=settings.ctx
        )
        _warm(theirs, settings)
        probe = [token % shop.shape.config["vocab_size"] for token in _PROBE]
        agreement = correlation(
            ours.ask("logits", tokens=probe), theirs.ask("logits", tokens=probe)
        )
        rounds = [
            _alternate(ours, theirs, settings, ours_first=number % 2 == 0)
            for number in range(settings.alternations)
        ]
        used = shop.shape.config["num_experts_per_tok"]
        return {
            "peer": kind.name,
            "quant": kind.quant,
            "repacked": kind.repack,
            "pure": kind.pure,
            "sizes": theirs.ask("sizes", path=path, experts_used=used),
            "correlation_of_logits": agreement,
            "alternations": rounds,
        }


def _alternate(
    ours: Worker, theirs: Worker, settings: Settings, ours_first: bool
) -> dict[str, float | None]:
    """Memory, then both sides: what each reached, and how many cores others kept busy."""
    found: dict[str, float | None] = {"ram_bw": measure_ram(settings.threads, _READ_NBYTES)}
    sides = [("ours", ours), ("theirs", theirs)]
    tests = {"decode": settings.new_tokens, "prefill": settings.prompt_tokens}
    for test, tokens in tests.items():
        for name, worker in sides if ours_first else sides[::-1]:
            answer = worker.timed(test, tokens=tokens)
            found[f"{name}_{test}"] = answer.result
            found[f"{name}_{test}_foreign_cores"] = answer.foreign_cores
    return found


def _together(ours: Worker, settings: Settings) -> dict[str, list[float]]:
    """Tokens a second of so many sequences at once, in turn, by their count."""
    rates: dict[str, list[float]] = {str(count): [] for count in settings.sequences}
    for _ in range(settings.alternations):
        for count in settings.sequences:
            steps = max(8, settings.new_tokens // count)
            rates[str(count)].append(ours.ask("together", tokens=steps, sequences=count))
    return rates


def _beside_memory(ours: Worker, settings: Settings) -> dict[str, list[float]]:
    """Tokens a second, a few at a time, and how fast memory was read before the first few, between
    them and after the last.

    Memory that others share is faster and slower from one second to the next.
    """
    rates: list[float] = []
    with RamBlock(settings.threads, _READ_NBYTES) as block:
        speeds = [block.read()]
        for _ in range(_TURNS):
            rates.append(ours.ask("decode", tokens=_TURN_TOKENS))
            speeds.append(block.read())
    return {"ram_bw": speeds, "decode": rates}


def correlation(a: list[float], b: list[float]) -> float:
    """Pearson's: 1.0 where both sides compute the same but for rounding."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    pairs = [(x - mean_a, y - mean_b) for x, y in zip(a, b, strict=True)]
    product = sum(x * y for x, y in pairs)
    return float(product / (sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs)) ** 0.5)
