"""Knows how a run on a device is put together; not what a step computes, nor where bytes lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moecli.decode_loop import DecodeLoop
from moecli.device_experts import (
    DECODE_TOKENS,
    CachedExperts,
    DecodeLanes,
    DeviceExperts,
    HostPart,
    SlicedExperts,
    Slices,
    StreamedExperts,
)
from moecli.device_tiers import DeviceTiers, MakeArena
from moecli.device_weights import DeviceWeights
from moecli.expert_math import ExpertMath
from moecli.generation import TokenSource
from moecli.graphs import Capture
from moecli.host_server import HostServer
from moecli.kv_cache import KvCache
from moecli.models.config import ModelSpec
from moecli.models.decoder import Decoder
from moecli.models.moe import expert_biases
from moecli.selfcheck import FastPaths
from moecli.session import Session
from offload.host import HostArena
from offload.host_lane import HostLane
from offload.pinning import Pinner
from offload.stats import CacheStats
from offload.usage import ExpertUsage


@dataclass(frozen=True)
class DeviceSettings:
    """How a device is used; what the self-check turned off is off here."""

    device: torch.device
    dtype: torch.dtype  # of activations
    kv_dtype: torch.dtype
    ctx: int
    capture: Capture  # how a decode step is made repeatable
    pinner: Pinner  # makes main memory readable for the device
    paths: FastPaths = FastPaths()  # noqa: RUF009  # frozen
    make_arena: MakeArena = HostArena  # where main memory for experts comes from


class DeviceParts:
    """The Parts of a run on a device. One conversation at a time: VRAM holds one KV cache."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DeviceWeights,
        tiers: DeviceTiers,
        settings: DeviceSettings,
        usage: ExpertUsage,
    ) -> None:
        """Owns `tiers` and `weights`; `usage` counts which experts are asked for."""
        self.tiers, self._weights, self._settings, self._spec = tiers, weights, settings, spec
        self._usage = usage
        biases = tuple(expert_biases(spec, weights).values())
        rules = (spec.weight_on_input, spec.expert_activation)
        math = ExpertMath(tiers.layout, *rules, biases)
        self.lane = self._open_lane(math) if tiers.needs_host else None
        host = None
        if self.lane is not None:
            host = HostPart(self.lane, math, readable=self._host_may_point)
        slices = None
        if tiers.slices is not None:
            slices = Slices(tiers.slices, math.of_first_rows(tiers.slice_layout))
        self.stream = StreamedExperts(tiers.manager, math, spec, tiers.residents, usage, slices)
        self._lanes = _decode_lanes(tiers, math, slices, host)
        experts = DeviceExperts(spec, self._lanes, self.stream)
        self.decoder = Decoder(
            spec,
            weights,
            experts,
            settings.dtype,
            guesses=spec.experts_per_token if tiers.plan.staging_slots else 0,
            guess_tokens=range(DECODE_TOKENS + 1, settings.ctx + 1),  # what is streamed
            device=settings.device,
            embedding_address=weights.embedding_address,
        )
        self._cache = KvCache(spec, settings.ctx, settings.kv_dtype, settings.device)
        self._session: Session | None = None
        loop = DecodeLoop(self.decoder, self._cache, settings.capture, self._check)
        self.tokens: TokenSource = loop.tokens

    @property
    def _host_may_point(self) -> bool:
        """Whether some experts come to main memory only when they are asked for."""
        plan = self.tiers.plan
        return not self.tiers.settled and not plan.slice_size and "link" in plan.lanes

    def _open_lane(self, math: ExpertMath) -> HostLane:
        tiers, spec = self.tiers, self._spec
        server = HostServer(
            tiers.manager,
            math.on_host(),
            spec,
            link_counts=tiers.plan.link_counts if self._host_may_point else None,
            rows=tiers.host_rows if tiers.plan.slice_size else None,
        )
        return HostLane(
            spec.hidden_size,
            spec.num_experts,
            spec.experts_per_token,
            DECODE_TOKENS,
            server,
            self._settings.device,
            self._settings.pinner,
            taken=server.release,
        )

    def _check(self) -> None:
        if self.lane is not None:
            self.lane.check()

    @property
    def stats(self) -> CacheStats:
        """The stream's requests and those of decode steps together. Waits for the device."""
        stats = self.tiers.manager.stats
        stats = replace(stats, hits=stats.hits + self.stream.resident_hits)
        cache = self.tiers.cache
        if cache is None:
            return self._with_slices(stats)
        layers = cache.counters()
        counts = sum(layers[1:], layers[0])
        moved = (counts.fetched + counts.linked + cache.num_arrived) * self.tiers.layout.nbytes
        return replace(
            stats,
            hits=stats.hits + counts.hits,
            misses=stats.misses + counts.requests - counts.hits,
            device_nbytes=stats.device_nbytes + moved,
            fetched=counts.fetched,
            linked=counts.linked,
            hosted=counts.host,
        )

    def _with_slices(self, stats: CacheStats) -> CacheStats:
        """The same where a part of every expert is in VRAM, and the lanes do the rest."""
        assert isinstance(self._lanes, SlicedExperts), "neither slots nor slices"
        spec = self._spec
        requests = self._lanes.num_tokens * len(spec.moe_layers) * spec.experts_per_token
        link_share = self.tiers.plan.link_size / self.tiers.layout.intermediate_size
        moved = round(requests * link_share * self.tiers.layout.nbytes)
        return replace(stats, sliced=requests, device_nbytes=stats.device_nbytes + moved)

    @property
    def peak_vram_nbytes(self) -> int | None:
        device = self._settings.device
        if device.type != "cuda":
            return None
        return torch.cuda.max_memory_reserved(device) + self.tiers.plan.context_nbytes

    def begin_step(self) -> None:
        self.tiers.manager.begin_step()
        self.stream.refresh()

    @contextmanager
    def running(self) -> Iterator[None]:
        if self.lane is None:
            yield
            return
        with self.lane.armed():
            yield

    def new_session(self) -> Session:
        """An empty conversation; the one before forgets everything."""
        if self._session is not None:
            self._session.tokens.clear()
        self._cache.truncate(0)
        self._session = Session(self._cache)
        return self._session

    def check_integrity(self, deep: bool = False) -> None:
        self.tiers.manager.check_integrity(deep)
        cache = self.tiers.cache
        if cache is not None:
            cache.check_integrity(self._file_bytes if deep else None)

    def _file_bytes(self, key: tuple[int, int]) -> bytes:
        index, expert = key
        return self.tiers.file_bytes((self._spec.moe_layers[index], expert))

    def _count_usage(self) -> None:
        cache, layers = self.tiers.cache, self._spec.moe_layers
        if cache is not None:
            self._usage.add_counts(dict(zip(layers, cache.requests(), strict=True)))

    def close(self) -> None:
        if self.lane is not None:
            self.lane.close()
        self._count_usage()
        self.tiers.close()
        self._weights.close()


def _decode_lanes(
    tiers: DeviceTiers, math: ExpertMath, slices: Slices | None, host: HostPart | None
) -> DecodeLanes:
    if tiers.cache is not None:
        return CachedExperts(tiers.cache, math, host)
    assert slices is not None, "neither slots nor slices"
    return SlicedExperts(slices, tiers.whole, math, tiers.link_end, host)
