"""Knows what the host does with experts that a device leaves to it; not how it is asked.

Legend: T tokens, k choices a token, H hidden, E experts of a layer.
"""

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from moecli.expert_math import ExpertMath, Span, address_table
from moecli.models.config import ModelSpec
from offload.lease import Lease
from offload.manager import ExpertManager


class HostServer:
    """Brings the experts into main memory, computes them there or lets the device read them.

    `link_counts[m]`: of m experts, how many the device reads of those that it can; None: none. The
    others are computed here. `rows(layer, expert)` says which inner rows are asked of that expert;
    None: all, always.
    """

    def __init__(
        self,
        manager: ExpertManager,
        math: ExpertMath,
        spec: ModelSpec,
        link_counts: Sequence[int] | None = None,
        rows: Callable[[int, int], Span] | None = None,
    ) -> None:
        assert link_counts is None or rows is None, "the device reads whole experts only"
        self._manager, self._math, self._rows = manager, math, rows
        self._layers, self._num_experts = spec.moe_layers, spec.num_experts
        self._link_counts = link_counts
        self._held: Lease | None = None  # what the device may still be reading

    @torch.inference_mode()
    def __call__(
        self,
        layer_index: int,
        hidden: Tensor,  # fp32 [T, H]
        topk_ids: Tensor,  # int64 [T, k]
        topk_weights: Tensor,  # fp32 [T, k]
        mask: Tensor,  # int32 [E]
    ) -> tuple[Tensor | None, dict[int, int] | None]:
        """What was computed, fp32 [T, H], and what the device is to read: expert -> address."""
        self.release()  # asking again, the device says that it is done with the last ones
        layer = self._layers[layer_index]
        lease = self._manager.lease_host(layer, mask.nonzero().flatten().tolist())
        readable: dict[int, int] = {}
        try:
            readable = self._readable(layer, list(lease.addresses))
            partial = None
            for span, here in self._by_span(layer, lease.addresses, readable).items():
                partial = torch.zeros_like(hidden) if partial is None else partial  # [T, H]
                table = address_table(here, self._num_experts)
                self._math.add(*(layer_index, partial, hidden, topk_ids, topk_weights, table, span))
        finally:
            if readable:
                self._held = lease
            else:
                lease.release()
        return partial, readable or None

    def _readable(self, layer: int, experts: list[int]) -> dict[int, int]:
        """Those that the device is to read, and where it sees them."""
        if self._link_counts is None:
            return {}
        seen = {expert: self._manager.link_address(layer, expert) for expert in experts}
        able = [expert for expert in experts if seen[expert]]
        return {expert: seen[expert] for expert in able[: self._link_counts[len(experts)]]}

    def _by_span(
        self, layer: int, addresses: Mapping[int, int], elsewhere: Container[int]
    ) -> dict[Span | None, dict[int, int]]:
        """What is computed here, expert -> address, by the rows that are asked."""
        found: dict[Span | None, dict[int, int]] = {}
        for expert, address in addresses.items():
            if expert not in elsewhere:
                span = None if self._rows is None else self._rows(layer, expert)
                found.setdefault(span, {})[expert] = address
        return found

    def release(self) -> None:
        """The device reads nothing here any more."""
        if self._held is not None:
            self._held.release()
            self._held = None
