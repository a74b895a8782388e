"""Knows how a device computes routed experts, wherever their bytes lie: VRAM, over the link, host.

A few tokens (decode) go through lanes that need no word from the host; many (a prompt) have their
experts streamed past them.

Legend: T tokens, k choices a token, H hidden, I intermediate, E experts of a layer, L MoE layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moecli.expert_math import ExpertMath, address_table
from moecli.models.config import ModelSpec
from moecli.models.provider import Pending, Resident
from offload.device_cache import DeviceCache
from offload.host_lane import HostLane
from offload.manager import ExpertManager
from offload.usage import ExpertUsage

DECODE_TOKENS = 8  # at most so many at once take the lanes; the kernels' own limit too


Finish = Callable[[Tensor], None]  # waits for what is not done yet, and adds it


class Computed:
    """A Pending whose work is all launched; the host's part, if any, is waited for at the end."""

    def __init__(self, out: Tensor, dtype: torch.dtype, finish: Callable[[Tensor], None]) -> None:
        self._out, self._dtype, self._finish = out, dtype, finish

    def result(self) -> Tensor:
        self._finish(self._out)
        return self._out.to(self._dtype)


def _nothing_left(out: Tensor) -> None:
    pass


class HostPart:
    """The host lane as a layer sees it: asked early, waited for late."""

    def __init__(self, lane: HostLane, math: ExpertMath, readable: bool) -> None:
        """`readable`: the host may answer with addresses that the device is to read itself."""
        self._lane, self._math, self._readable = lane, math, readable

    def ask(
        self, layer_index: int, hidden: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
    ) -> Finish:
        """Hand the experts in `mask`, int32 [E], to the host; the result waits and adds."""
        self._lane.ring(layer_index, hidden, ids, weights, mask)

        def finish(out: Tensor) -> None:
            partial, addresses = self._lane.wait()  # fp32 [T, H], int64 [E]
            out.add_(partial)
            if self._readable:
                self._math.add(layer_index, out, hidden, ids, weights, addresses)

        return finish


class DecodeLanes(Protocol):
    """Computes the experts of at most DECODE_TOKENS tokens with no word from the host."""

    def begin(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Computed: ...


class CachedExperts:
    """Whole experts in slots; the others fetched, read over the link, or left to the host."""

    def __init__(self, cache: DeviceCache, math: ExpertMath, host: HostPart | None) -> None:
        self._cache, self._math, self._host = cache, math, host

    def begin(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Computed:
        cache = self._cache
        finish: Finish = _nothing_left
        cache.resolve(index, ids)
        if self._host is not None:
            finish = self._host.ask(index, hidden, ids, weights, cache.host_mask)
        cache.fetch()
        out = hidden.new_zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        self._math.add(index, out, hidden, ids, weights, cache.step_addresses)
        return Computed(out, hidden.dtype, finish)


@dataclass(frozen=True)
class Slices:
    """The first inner rows of every expert, in VRAM."""

    addresses: Tensor  # int64 [L, E]
    math: ExpertMath  # of experts that have these rows alone

    @property
    def size(self) -> int:
        return self.math.layout.intermediate_size

    def add(self, index: int, out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self.math.add(index, out, hidden, ids, weights, self.addresses[index])


class SlicedExperts:
    """Inner rows [0, s) of every expert in VRAM, [s, c) read over the link, [c, I) by the host.

    Of an expert that the device cannot read in main memory all rows from s on are the host's.
    """

    def __init__(
        self,
        slices: Slices,
        whole: Tensor,  # int64 [L, E]: where the device reads whole experts in main memory
        math: ExpertMath,
        link_end: int,  # c
        host: HostPart | None,
    ) -> None:
        self._slices, self._whole, self._math, self._host = slices, whole, math, host
        begin, inner = slices.size, math.layout.intermediate_size
        assert begin <= link_end <= inner, f"slice {begin}, link to {link_end}, of {inner} rows"
        self._link_span = (begin, link_end)
        # Only here does anything depend on what is reachable, so once and not in every step.
        asked = (whole == 0) | (link_end < inner)
        self._asked = asked.int()  # int32 [L, E]: 1 where the host has rows to compute
        assert host is not None or not bool(asked.any()), "rows that no lane computes"
        self._num_tokens = torch.zeros(1, dtype=torch.int64, device=whole.device)

    @property
    def num_tokens(self) -> int:
        """How many have passed through all layers here. Waits for the device."""
        return int(self._num_tokens)

    def begin(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Computed:
        finish: Finish = _nothing_left
        if index == 0:
            self._num_tokens.add_(hidden.shape[0])
        if self._host is not None:
            chosen = torch.zeros_like(self._asked[index])  # int32 [E]
            chosen.index_fill_(0, ids.flatten(), 1)
            finish = self._host.ask(index, hidden, ids, weights, chosen * self._asked[index])
        out = hidden.new_zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        self._slices.add(index, out, hidden, ids, weights)
        if self._link_span[0] < self._link_span[1]:
            whole = self._whole[index]
            self._math.add(index, out, hidden, ids, weights, whole, self._link_span)
        return Computed(out, hidden.dtype, finish)


class StreamedExperts:
    """The experts of many tokens: what is resident where it is, the others streamed in waves.

    Of experts whose first rows lie in `slices` the manager brings the others alone.
    """

    def __init__(
        self,
        manager: ExpertManager,
        math: ExpertMath,
        spec: ModelSpec,
        snapshot: Callable[[], dict[tuple[int, int], int]],
        usage: ExpertUsage,
        slices: Slices | None = None,
    ) -> None:
        """`snapshot` says where the experts (layer, expert) lie that are in VRAM already; `usage`
        counts what is asked for here."""
        self._manager, self._math, self._slices = manager, math, slices
        self._num_experts = spec.num_experts
        self._indices = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._span = None if slices is None else (slices.size, math.layout.intermediate_size)
        self._snapshot = snapshot
        self._usage = usage
        self._residents: dict[tuple[int, int], int] | None = None
        self.resident_hits = 0

    def refresh(self) -> None:
        """What is resident may have changed: ask again before the next layer."""
        self._residents = None

    def resident(self, layer: int, experts: list[int]) -> dict[int, int]:
        """Those of these experts that need no streaming, and where they are."""
        if self._residents is None:
            self._residents = self._snapshot()
        found = {expert: self._residents.get((layer, expert), 0) for expert in experts}
        return {expert: address for expert, address in found.items() if address}

    def begin(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Computed:
        wanted, index = _distinct(ids), self._indices[layer]
        self._usage.add(layer, wanted)
        here = self.resident(layer, wanted)
        self.resident_hits += len(here)
        out = hidden.new_zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        if self._slices is not None:
            self._slices.add(index, out, hidden, ids, weights)
        if here:
            self._math.add(index, out, hidden, ids, weights, self._table(here, out.device))
        missing = [expert for expert in wanted if expert not in here]
        for wave in self._manager.waves(layer, missing):
            with self._manager.ensure(layer, wave) as lease:
                table = self._table(lease.addresses, out.device)
                self._math.add(index, out, hidden, ids, weights, table, self._span)
        return Computed(out, hidden.dtype, _nothing_left)

    def prefetch(self, layer: int, ids: Tensor) -> None:
        """Start copying what `layer` will probably choose, [T, k]; returns at once."""
        guesses = _distinct(ids)
        here = self.resident(layer, guesses)
        missing = [expert for expert in guesses if expert not in here]
        self._manager.prefetch(layer, missing, to_device=True)

    def _table(self, addresses: dict[int, int], device: torch.device) -> Tensor:
        return address_table(addresses, self._num_experts).to(device, non_blocking=True)


class DeviceExperts:
    """An ExpertProvider on a device: lanes for a few tokens, a stream for many."""

    def __init__(self, spec: ModelSpec, lanes: DecodeLanes, stream: StreamedExperts) -> None:
        self._indices = {layer: index for index, layer in enumerate(spec.moe_layers)}
        self._lanes, self.stream = lanes, stream

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Pending:
        if hidden.shape[0] <= DECODE_TOKENS:
            return self._lanes.begin(self._indices[layer], hidden, topk_ids, topk_weights)
        return self.stream.begin(layer, hidden, topk_ids, topk_weights)

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        if topk_ids.shape[0] > DECODE_TOKENS:
            self.stream.prefetch(layer, topk_ids)

    def resident(self, layer: int) -> Resident | None:
        """Experts come and go."""
        return None


def _distinct(ids: Tensor) -> list[int]:
    return sorted(set(ids.flatten().tolist()))
