"""Knows how a run on the processor is put together: experts in main memory, read from disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from moecli.experts import OffloadedExperts
from moecli.generation import TokenSource
from moecli.kv_cache import KvCache
from moecli.models.attention import Weights
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.moe import expert_biases
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


class ProcessorParts:
    """The Parts of a run on the processor."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ExpertLayout,
        plan: MemoryPlan,
        weights: Weights,
        disk: DiskTier,
        new_cache: Callable[[], KvCache],
        usage: ExpertUsage,
        keep: bool = True,
        trace: Trace | None = None,
    ) -> None:
        """Owns `disk` from here on. keep=False: every expert is read when it is asked for."""
        assert plan.device_slots == 0, "a plan for a device"
        arena = HostArena(plan.host_arena_nbytes, plan.slot_nbytes)
        self.manager = ExpertManager(disk, arena, keep=keep, trace=trace)
        biases = expert_biases(spec, weights)
        self._experts = OffloadedExperts(self.manager, layout, spec, usage, biases)
        self.decoder = Decoder(
            *(spec, weights, self._experts, COMPUTE_DTYPE),
            guesses=spec.experts_per_token if self._experts.reads_ahead else 0,
            guess_tokens=range(1, spec.max_context + 1),  # of a prompt, too: the disk is slow
        )
        self.tokens: TokenSource = Stepwise(self.decoder, self.begin_step)
        self._new_cache = new_cache

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
        return Session(self._new_cache())

    def check_integrity(self, deep: bool = False) -> None:
        self.manager.check_integrity(deep)

    def close(self) -> None:
        self._experts.cancel()
        self.manager.close()
