"""Wires plan, experts, model and tokenizer into one thing that answers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moecli.backends import fallback, use_kernels
from moecli.config import EngineConfig, SamplingConfig
from moecli.device_tiers import Progress
from moecli.errors import MoecliError
from moecli.events import Event
from moecli.favourites import Favourites
from moecli.footprint import expert_layout
from moecli.generation import Runtime, forward_together, generate
from moecli.markup import Splitter
from moecli.measuring import largest_file, with_compute
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.facts import ModelFacts, read_facts
from moecli.models.naming import dense_loader
from moecli.models.outline import Counted
from moecli.models.text_decoder import TextDecoder
from moecli.opening_device import (
    compute_device,
    dense_weights,
    device_machine,
    device_settings,
    open_device,
    within_library,
    within_paths,
)
from moecli.parts import Parts
from moecli.planning import plan_model
from moecli.processor import KV_DTYPE, OwnModel, ProcessorModel, ProcessorParts
from moecli.prompt import Prompt, place
from moecli.session import Session
from moecli.tokenizer import Tokenizer
from moecli.vision.eye import Eye
from moecli.vision.picture import Picture
from moecli.vision.tokens import IMAGE, spread
from moecli.vision.tower import Tower
from offload.disk import DiskTier, ExpertSpan
from offload.hardware import Machine, detect, peak_rss_nbytes
from offload.plan import MemoryPlan
from offload.stats import CacheStats
from offload.trace import Trace
from quant.checkpoint import QuantizedCheckpoint, read_json

DEFAULT_CTX = 8192
_PROMPT_END = 16  # tokens at the end of a prompt, in which it may begin the reasoning
Message = dict[str, Any]  # `role`, `content`, and of some `images`: Pictures
Notify = Callable[[str], None]


def _say_nothing(message: str) -> None:
    pass


def _count_nothing(done: int, total: int) -> None:
    pass


class Engine:
    """A quantized model ready to generate. Use it as a context manager, or close() it."""

    def __init__(
        self,
        checkpoint: QuantizedCheckpoint,
        config: EngineConfig,
        notify: Notify = _say_nothing,
        trace: Trace | None = None,
        progress: Progress = _count_nothing,
        usage_file: Path | None = None,
    ) -> None:
        self.path = checkpoint.path
        self._notify, self._told_of_system = notify, False
        self.spec = read_facts(checkpoint.config)
        self._favourites = Favourites(usage_file, self.spec, notify)
        self.tokenizer = Tokenizer.open(self.path)
        self.generation_config = _read_generation_config(self.path)
        self.ctx = context_size(config.ctx, self.spec)
        if not isinstance(self.spec, ModelSpec):
            config = within_library(config, self.spec, self.ctx, notify)
        self.rss_before = peak_rss_nbytes()  # what of later peaks is not the model's
        device = compute_device(config)
        self._parts: Parts
        if device is None:
            use_kernels(config.kernels, torch.device("cpu"))
            known = with_compute(
                *(detect(self.path), checkpoint.layout, self.spec.experts_per_token),
                measure=False,
                disk=largest_file(self.path),
            )
            self.plan = _plan(checkpoint, self.spec, self.ctx, config, known)
            self._parts = ProcessorParts(
                self.spec,
                checkpoint.layout,
                self.plan,
                _processor_model(checkpoint, self.spec, self.ctx, config),
                _disk(checkpoint, self.spec, self.plan),
                self._favourites.usage,
                config.keep_experts,
                trace,
            )
        else:
            assert isinstance(self.spec, ModelSpec), "the library's models stay on the processor"
            weights = dense_loader(self.spec, checkpoint.checkpoint.tensors, checkpoint.dense)
            settings = device_settings(device, config, self.ctx, notify)
            machine = device_machine(self.path, self.spec, checkpoint.layout, config)
            limited = within_paths(config, settings.paths)
            self.plan = _plan(checkpoint, self.spec, self.ctx, limited, machine)
            self._parts = open_device(
                self.spec,
                checkpoint.layout,
                self.plan,
                dense_weights(self.spec, weights, config.dense_scheme, device),
                _disk(checkpoint, self.spec, self.plan),
                settings,
                notify,
                self._favourites,
                progress,
            )
        self.eye = _eye(checkpoint, self.spec, self.decoder) if config.pictures else None
        self._runtime = Runtime(
            self.decoder,
            self.tokenizer,
            self._parts.tokens,
            self.expert_stats,
            lambda: self._parts.peak_vram_nbytes,
            self._parts.begin_step,
            self.ctx,
            config.prefill_chunk,
            self.eye,
            self.rss_before,
        )

    @property
    def decoder(self) -> TextDecoder:
        return self._parts.decoder

    @classmethod
    def open(
        cls,
        path: Path,
        config: EngineConfig,
        notify: Notify = _say_nothing,
        trace: Trace | None = None,
        progress: Progress = _count_nothing,
        usage_file: Path | None = None,
    ) -> "Engine":
        """Open what `moecli quantize` wrote.

        `notify` gets a message about every way in which the run is less than what was asked for;
        `trace`, when given, records what the routers ask for; `progress` hears how many experts of
        how many are in their places, where they are put there at once; `usage_file` keeps from run
        to run which experts are wanted most. Raises MoecliError, QuantError or OffloadError: no
        quantized model, a context too long, a budget too small.
        """
        cores = config.threads or detect().physical_cores
        if cores is not None:
            torch.set_num_threads(cores)
        engine = cls(QuantizedCheckpoint.open(path), config, notify, trace, progress, usage_file)
        if slow := fallback(config.kernels):
            notify(slow)
        if engine.plan.ram_short:
            notify(
                f"the plan takes {engine.plan.ram_short >> 20} MiB more than this machine has "
                "free now; other programs may be slowed down"
            )
        return engine

    def new_session(self) -> Session:
        """An empty conversation. On a graphics card there is one KV cache: the last session's."""
        return self._parts.new_session()

    def encode_text(self, text: str, pictures: Sequence[Picture] = ()) -> list[int]:
        """Token ids of a raw prompt, with what the model wants before a text.

        Pictures stand where the text names IMAGE, or before it where it names none.
        """
        if pictures:
            named = text if IMAGE in text else IMAGE * len(pictures) + text
            text = spread(named, [picture.text for picture in pictures])
        return self.tokenizer.encode(text, special=True)

    def encode_chat(self, messages: list[Message], session: Session | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant is to speak.

        What `session` holds is kept token by token where the text is the same: an answer would
        often be divided into other tokens when encoded anew, and then computed anew.
        """
        messages = self._with_system(messages)
        pictures = [picture for message in messages for picture in message.get("images", ())]
        text = self.tokenizer.render(map(self._for_template, messages), add_generation_prompt=True)
        if pictures:
            text = spread(text, [picture.text for picture in pictures])
        return self.tokenizer.encode_after(session.tokens if session is not None else [], text)

    def splitter(self, token_ids: list[int]) -> Splitter:
        """What divides the answer to this context into reasoning and the rest."""
        end = self.tokenizer.decode(token_ids[-_PROMPT_END:], skip_special=False)
        return self.tokenizer.markup.splitter(end)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The system prompt where the template takes it: else before the first question."""
        if messages[0]["role"] != "system" or self.tokenizer.takes_system:
            return messages
        if not self._told_of_system:
            self._told_of_system = True
            self._notify(
                "the chat template of this model has no system role: the system prompt goes "
                "before the first question"
            )
        system, first, *rest = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]

    def _for_template(self, message: Message) -> Message:
        """A message as chat templates take it: pictures first, reasoning as they want it."""
        if message["role"] == "assistant":
            fields = self.tokenizer.markup.fields(message["content"])
            return {"role": "assistant", **fields}
        if not message.get("images"):
            return message
        parts = [*({"type": "image"} for _ in message["images"])]
        return {
            "role": message["role"],
            "content": [*parts, {"type": "text", "text": message["content"]}],
        }

    def generate(
        self,
        session: Session,
        token_ids: list[int],
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] = lambda: False,
        pictures: Sequence[Picture] = (),
    ) -> Iterator[Event]:
        """Events of one answer to the whole context `token_ids`; the last one is Finished.

        `pictures`: all whose patches are among the tokens, in their order. Raises MoecliError for
        an empty context and for one that leaves no room for an answer.
        """
        if not token_ids:
            raise MoecliError("the prompt is empty", "say something after the model's name")
        if len(token_ids) >= self.ctx:
            raise MoecliError(
                f"the prompt has {len(token_ids)} tokens; the context holds {self.ctx}",
                f"shorten it, or give a longer `--ctx`, {self.spec.max_context} at most",
            )
        prompt = Prompt(token_ids)
        if pictures:
            assert self.eye is not None, "a picture, and no room was kept for it"
            prompt = place(token_ids, pictures, self.eye.patch_token_id)
        return self._generate(session, prompt, sampling, cancelled)

    def _generate(
        self,
        session: Session,
        prompt: Prompt,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool],
    ) -> Iterator[Event]:
        with self._parts.running():
            yield from generate(self._runtime, session, prompt, sampling, cancelled)

    def step(self, sessions: Sequence[Session], token_ids: Sequence[list[int]]) -> Tensor:
        """Logits fp32 [S, V] after the next tokens of several sessions, in one forward pass.

        The sessions hold the tokens then. On a graphics card there can be but one session.
        """
        with self._parts.running():
            self._parts.begin_step()
            return forward_together(self.decoder, sessions, token_ids)

    def expert_stats(self) -> CacheStats:
        """What the expert cache has counted since the model was opened."""
        return self._parts.stats

    def check_integrity(self, deep: bool = False) -> None:
        """Assert that the bookkeeping of experts is sound; `deep` compares bytes with the file."""
        self._parts.check_integrity(deep)

    def close(self) -> None:
        self._parts.close()
        self._favourites.keep()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def context_size(asked: int | None, spec: Counted) -> int:
    """Tokens of context: what was asked for, or the smaller of the model's own and 8192."""
    if asked is None:
        return min(spec.max_context, DEFAULT_CTX)
    if asked > spec.max_context:
        raise MoecliError(
            f"a context of {asked} tokens is longer than the model's own {spec.max_context}",
            f"give `--ctx {spec.max_context}` or less",
        )
    return asked


def _processor_model(
    checkpoint: QuantizedCheckpoint, spec: ModelFacts, ctx: int, config: EngineConfig
) -> ProcessorModel:
    names = checkpoint.checkpoint.tensors
    if isinstance(spec, ModelSpec):
        kv_dtype = torch.int8 if config.kv_dtype == "int8" else KV_DTYPE
        return OwnModel(spec, dense_loader(spec, names, checkpoint.dense), ctx, kv_dtype)
    from moecli.models.hf.model import LibraryModel

    return LibraryModel(spec, names, checkpoint.dense, ctx)


def _plan(
    checkpoint: QuantizedCheckpoint,
    spec: ModelFacts,
    ctx: int,
    config: EngineConfig,
    machine: Machine,
) -> MemoryPlan:
    assert checkpoint.layout == expert_layout(spec, checkpoint.scheme), "config.json and manifest"
    schemes = (checkpoint.scheme, checkpoint.dense_scheme)
    return plan_model(spec, schemes, ctx, config, machine)


def _disk(checkpoint: QuantizedCheckpoint, spec: ModelFacts, plan: MemoryPlan) -> DiskTier:
    spans = {
        (layer, expert): ExpertSpan(*checkpoint.expert_span(layer, expert))
        for layer in spec.moe_layers
        for expert in range(spec.num_experts)
    }
    return DiskTier(spans, drop_cache=plan.drop_cache)


def _eye(checkpoint: QuantizedCheckpoint, spec: ModelFacts, decoder: TextDecoder) -> Eye | None:
    """What looks at pictures, where the model sees them; it reads nothing before the first."""
    if not isinstance(spec, ModelSpec) or spec.vision is None:
        return None
    assert isinstance(decoder, Decoder), "a spec of our own, and the library's decoder"
    names, read = checkpoint.checkpoint.tensors, checkpoint.checkpoint.read
    return Eye(
        spec,
        decoder,
        lambda before_part: Tower(
            *(checkpoint.config["vision_config"], spec.hidden_size, names, read),
            *(decoder.device, decoder.dtype, before_part),
        ),
    )


def _read_generation_config(path: Path) -> dict[str, Any]:
    """The checkpoint's own defaults of sampling; empty when it has none."""
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else {}
