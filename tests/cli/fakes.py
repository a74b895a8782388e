"""An engine and a converter that answer from the prompt alone, without torch and at once.

What the last message says decides the answer: see `FakeEngine._script`. Tokens are characters.
`install` puts both in place of the real modules; run as a program it is `moecli` with them.
"""

import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from moecli.card import takes_card
from moecli.config import EngineConfig, SamplingConfig
from moecli.errors import MoecliError
from moecli.events import Event, Finished, GenerationStats, PrefillProgress, TextDelta
from moecli.markup import Splitter, Thinking
from offload.hardware import Machine
from offload.plan import ModelFootprint, make_plan
from offload.stats import CacheStats

FOOTPRINT = ModelFootprint(
    dense_nbytes=8 << 20,
    embedding_nbytes=1 << 20,
    kv_nbytes=2 << 20,
    workspace_nbytes=1 << 20,
    num_moe_layers=4,
    num_experts=16,
    experts_per_token=1,
    expert_nbytes=80_000,
    slot_nbytes=81_920,
)
PEAK_RSS = 100 << 20


class FakeSession:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def reset(self) -> None:
        self.tokens.clear()


class FakeEngine:
    """Opened engines are kept in `opened`, every call of generate in `calls`."""

    opened: ClassVar[list["FakeEngine"]] = []
    generation_config: ClassVar[dict[str, Any]] = {}

    def __init__(self, path: Path, config: EngineConfig) -> None:
        self.path, self.config = path, config
        self.ctx = config.ctx or 2048
        machine = Machine(ram_total=64 << 20, ram_available=32 << 20, ram_bw=1e9, disk_bw=1e8)
        self.plan = make_plan(FOOTPRINT, machine, config.ram_nbytes)
        self.spec = SimpleNamespace(
            architecture="FakeForCausalLM", num_params=22_700_000, num_active_params=5_000_000
        )
        self.calls: list[tuple[str, SamplingConfig]] = []
        self.shown: list[list[str]] = []  # names of the pictures of each call
        self.eye = None
        self.closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        config: EngineConfig,
        notify: Callable[[str], None] = print,
        progress: Callable[[int, int], None] = lambda done, total: None,
        usage_file: Path | None = None,
    ) -> "FakeEngine":
        takes_card(config)  # as the real one asks
        if not path.is_dir():
            raise MoecliError(f"`{path}` is no model", "give one")
        if os.environ.get("FAKE_LOADING"):
            progress(3, 8)
            progress(8, 8)
        notify("running on a fake") if os.environ.get("FAKE_NOTE") else None
        cls.opened.append(cls(path, config))
        return cls.opened[-1]

    def new_session(self) -> FakeSession:
        return FakeSession()

    def encode_text(self, text: str, pictures: Any = ()) -> list[int]:
        return [ord(c) for c in "".join(f"[{p.path.name}]" for p in pictures) + text]

    def encode_chat(self, messages: list[dict], session: FakeSession | None = None) -> list[int]:
        if session is not None and any(m["content"] == "break encode" for m in messages):
            raise ValueError("a fault in the fake")
        turns = "".join(f"<{m['role']}>{_shown(m)}{m['content']}\n" for m in messages)
        return self.encode_text(turns + "<assistant>")

    def splitter(self, token_ids: list[int]) -> Splitter:
        return Thinking().splitter("".join(map(chr, token_ids)))

    def expert_stats(self) -> SimpleNamespace:
        return SimpleNamespace(hit_rate=0.75)

    def generate(
        self,
        session: FakeSession,
        token_ids: list[int],
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] = lambda: False,
        pictures: Any = (),
    ) -> Iterator[Event]:
        context = "".join(map(chr, token_ids))
        self.calls.append((context, sampling))
        self.shown.append([picture.path.name for picture in pictures])
        question = context.rpartition("<user>")[2].removesuffix("\n<assistant>")
        if question == "too long":
            raise MoecliError("the prompt has 9999 tokens; the context holds 2048", "shorten it")
        if question == "once" and len(self.calls) > 1:
            raise MoecliError("I said it once", "ask something else")
        cached = 0
        while cached < min(len(session.tokens), len(token_ids) - 1):
            if session.tokens[cached] != token_ids[cached]:
                break
            cached += 1
        session.tokens[:] = token_ids
        yield from self._stream(question, session, len(token_ids), cached, sampling, cancelled)

    def _stream(
        self,
        question: str,
        session: FakeSession,
        prompt: int,
        cached: int,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool],
    ) -> Iterator[Event]:
        reason, text, count = "stop", "", 0
        yield PrefillProgress((prompt - cached) // 2, prompt - cached)
        while question == "slow start" and not cancelled():
            time.sleep(0.005)
        yield PrefillProgress(prompt - cached, prompt - cached)
        for piece in () if cancelled() else self._script(question):
            if sampling.max_tokens is not None and count == sampling.max_tokens:
                reason = "length"
                break
            yield TextDelta(piece)
            text, count = text + piece, count + 1
            if cancelled():
                break
        if cancelled():
            reason = "cancelled"
        if question == "fill":
            reason = "context"
        session.tokens += [ord(c) for c in text]
        yield Finished(reason, text, _stats(prompt, cached, count))

    def _script(self, question: str) -> Iterator[str]:
        """The answer in pieces."""
        match question:
            case "endless":
                for number in range(100_000):
                    yield f"w{number} "
                    time.sleep(0.005)
            case "signs":
                yield from "é 漢 👍🏽 [/INST] [bold]x[/bold]"
            case "escape":
                yield "\x1b[31mred\x07\tend"
            case "lines":
                yield "one\ntwo\n"
            case "deaf":
                yield "now "
                time.sleep(60)  # nobody reads the flag
            case "reason":
                yield from ("<think>\nhm", "m \x1b[31m\n</think>\n\nso ", "it is")
            case "nothing":
                return
            case "break":
                yield "so far "
                raise ZeroDivisionError("a fault in the fake")
            case _:
                yield "you said: "
                yield question

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shown(message: dict) -> str:
    """What stands for the pictures of a message."""
    return "".join(f"[{picture.path.name}]" for picture in message.get("images", ()))


def _stats(prompt: int, cached: int, generated: int) -> GenerationStats:
    return GenerationStats(
        prompt_tokens=prompt,
        cached_tokens=cached,
        generated_tokens=generated,
        ttft_s=0.25,
        prefill_tok_s=80.0,
        decode_tok_s=20.0,
        expert_hits=30,
        expert_misses=10,
        expert_nbytes_read=800_000,
        peak_rss_nbytes=PEAK_RSS,
        decode_steps=2,
        decoded=CacheStats(hits=12, misses=4, disk_nbytes=4 * FOOTPRINT.expert_nbytes),
        grown_rss_nbytes=PEAK_RSS // 5,
    )


@dataclass(frozen=True)
class FakeProgress:
    done_nbytes: int
    total_nbytes: int
    item: str
    error: float
    elapsed_s: float
    eta_s: float | None


@dataclass(frozen=True)
class FakeResult:
    out: Path
    out_nbytes: int = 30 << 20
    source_nbytes: int = 100 << 20
    source_form: str = ""
    bpw_experts: float = 4.5
    bpw: float = 5.25
    error_experts: float = 0.0789
    error_dense: float = 0.0061
    units_done: int = 10
    units_resumed: int = 0
    seconds: float = 12.3


def fake_quantize_model(
    source: Path, out: Path, scheme: Any, dense: Any, progress: Any, notify: Any = None
) -> Any:
    """Writes a directory that the store takes for a model; FAKE_INTERRUPT stops it halfway."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(exist_ok=True)
    for done in range(1, 21):
        progress(FakeProgress(done * 5, 100, f"item {done}", 0.08, float(done), 20.0 - done))
        if os.environ.get("FAKE_INTERRUPT") and done == 10:
            raise KeyboardInterrupt
    write_model(partial, scheme.name, dense and dense.name)
    partial.rename(out)
    return FakeResult(out)


def write_model(path: Path, scheme: str = "int4-g32", dense: str | None = "int8-g128") -> Path:
    """A directory that the store takes for a model; nothing that could be opened."""
    path.mkdir(parents=True, exist_ok=True)
    manifest = {"format": 1, "scheme": scheme, "dense_scheme": dense}
    (path / "moecli.json").write_text(json.dumps(manifest))
    (path / "model.safetensors").write_bytes(bytes(5000))
    return path


def install(put: Callable[[str, Any], None]) -> None:
    """Put the fakes in place; `put(name, module)` sets an entry of sys.modules."""
    engine = types.ModuleType("moecli.engine")
    engine.Engine = FakeEngine  # type: ignore[attr-defined]
    put("moecli.engine", engine)
    conversion = types.ModuleType("moecli.conversion")
    conversion.quantize_model = fake_quantize_model  # type: ignore[attr-defined]
    put("moecli.conversion", conversion)


if __name__ == "__main__":
    from moecli.cli import main

    install(sys.modules.__setitem__)
    main()
