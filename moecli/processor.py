"""Knows how a run on the processor is put together: experts in main memory, read from disk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moecli.experts import OffloadedExperts
from moecli.gated import Gate
from moecli.generation import TokenSource
from moecli.kv_cache import KvCache
from moecli.models.attention import Weights
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.facts import ModelFacts
from moecli.models.moe import expert_biases
from moecli.models.provider import ExpertProvider
from moecli.models.text_decoder import SequenceCache, TextDecoder
from moecli.session import Session
from moecli.stepwise import Stepwise
from offload.disk import DiskTier
from offload.host import HostArena
from offload.manager import ExpertManager
from offload.plan import MemoryPlan
from offload.stats import CacheStats
from offload.trace import Trace
from offload.usage import ExpertUsage
from quant.layout import ExpertLayout

COMPUTE_DTYPE = torch.float32
KV_DTYPE = torch.bfloat16  # unless int8 is asked for


class ProcessorModel(Protocol):
    """A model that is to compute on the processor, with experts that it is given."""

    @property
    def gates(self) -> Mapping[int, Gate]:
        """By layer, what stands between an expert's products where that is not SiLU's."""
        ...

    @property
    def biases(self) -> Mapping[int, Tensor]:
        """By layer, of experts: fp32 [E, 2 I + H]."""
        ...

    @property
    def activation(self) -> str:
        """Of experts without gates, by its name in quant.ops."""
        ...

    def decoder(self, experts: ExpertProvider, reads_ahead: bool) -> TextDecoder:
        """Called once; `reads_ahead`: what the next layer will choose is worth a guess."""
        ...

    def new_cache(self) -> SequenceCache:
        """Of an empty sequence."""
        ...


@dataclass(frozen=True)
class OwnModel:
    """A ProcessorModel of a family that our own decoder knows."""

    spec: ModelSpec
    weights: Weights
    ctx: int
    kv_dtype: torch.dtype

    @property
    def gates(self) -> Mapping[int, Gate]:
        return {}

    @property
    def biases(self) -> Mapping[int, Tensor]:
        return expert_biases(self.spec, self.weights)

    @property
    def activation(self) -> str:
        return self.spec.expert_activation

    def decoder(self, experts: ExpertProvider, reads_ahead: bool) -> Decoder:
        return Decoder(
            *(self.spec, self.weights, experts, COMPUTE_DTYPE),
            guesses=self.spec.experts_per_token if reads_ahead else 0,
            guess_tokens=range(1, self.spec.max_context + 1),  # of a prompt, too: the disk is slow
        )

    def new_cache(self) -> KvCache:
        return KvCache(self.spec, self.ctx, self.kv_dtype)


class ProcessorParts:
    """The Parts of a run on the processor."""

    def __init__(
        self,
        spec: ModelFacts,
        layout: ExpertLayout,
        plan: MemoryPlan,
        model: ProcessorModel,
        disk: DiskTier,
        usage: ExpertUsage,
        keep: bool = True,
        trace: Trace | None = None,
    ) -> None:
        """Owns `disk` from here on. keep=False: every expert is read when it is asked for."""
        assert plan.device_slots == 0, "a plan for a device"
        arena = HostArena(plan.host_arena_nbytes, plan.slot_nbytes)
        self.manager = ExpertManager(disk, arena, keep=keep, trace=trace)
        self._experts = OffloadedExperts(
            *(self.manager, layout, spec, usage),
            *(model.gates, model.biases, model.activation),
        )
        self.decoder = model.decoder(self._experts, self._experts.reads_ahead)
        self.tokens: TokenSource = Stepwise(self.decoder, self.begin_step)
        self._model = model

    @property
    def stats(self) -> CacheStats:
        return self.manager.stats

    @property
    def peak_vram_nbytes(self) -> None:
        return None

    def begin_step(self) -> None:
        self.manager.begin_step()

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def new_session(self) -> Session:
        return Session(self._model.new_cache())

    def check_integrity(self, deep: bool = False) -> None:
        self.manager.check_integrity(deep)

    def close(self) -> None:
        self._experts.cancel()
        self.manager.close()
