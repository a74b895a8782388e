"""Knows how routed experts are computed where they lie: joins quant's ops and offload's manager.

Legend: T tokens, k choices a token, n choices of one group of experts, H hidden size, E experts a
layer.
"""

from array import array
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecli.expert_math import address_table
from moecli.gated import Gate, gated_experts
from moecli.models.facts import ModelFacts
from moecli.models.provider import Resident
from offload.lease import Lease
from offload.manager import ExpertManager
from offload.stream import Stream
from offload.usage import ExpertUsage
from quant import ops
from quant.layout import ExpertLayout

_AHEAD_SLOTS = 4  # slots that a token's choice must have for reading ahead to pay
_WHOLE_TOKENS = 8  # for so many, picking out a group's choices costs more than it saves


class OffloadedExperts:
    """An ExpertProvider over an ExpertManager: send for a layer's experts, compute what comes.

    Each (token, choice) is computed once, with the group that its expert came in, so the sum over
    choices does not depend on what was resident.
    """

    def __init__(
        self,
        manager: ExpertManager,
        layout: ExpertLayout,
        spec: ModelFacts,
        usage: ExpertUsage,
        gates: Mapping[int, Gate] | None = None,
        biases: Mapping[int, Tensor] | None = None,
        activation: str = "silu",
    ) -> None:
        """`usage` counts what is asked for here; `gates`, by layer, where no activation is known to
        kernels; `biases`: by layer, fp32 [E, 2 I + H]."""
        self._manager = manager
        self._usage = usage
        self._gates = gates or {}
        self._layout = layout
        self._spec = spec
        self._biases, self._activation = biases or {}, activation
        self._stream: Stream | None = None  # the newest
        self._guess: tuple[int, list[int]] | None = None  # a layer and its experts
        stay = manager.stays and not self._gates
        self._residents = {layer: self._resident(layer) for layer in spec.moe_layers if stay}
        total = len(spec.moe_layers) * spec.num_experts
        # With fewer slots a guess is evicted before it is asked for: on the demo model 84% of
        # what 2 slots read ahead was wasted, 26% of what 12 did.
        worthwhile = range(_AHEAD_SLOTS * spec.experts_per_token, total)
        self.reads_ahead = manager.keep and manager.capacity in worthwhile

    def begin(
        self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> "PendingExperts":
        """[T, H] from hidden [T, H], topk_ids [T, k], topk_weights [T, k]; its bytes are sent for.

        What was guessed of the next layer is sent for where this layer leaves slots.
        """
        self.cancel()
        if self._guess is not None and self._guess[0] == layer:
            self._guess = None  # what it chose is known now
        wanted = sorted(set(topk_ids.flatten().tolist()))
        self._usage.add(layer, wanted)
        self._stream = self._manager.stream(layer, wanted)
        choices = Choices(
            *(hidden, topk_ids, topk_weights, self._layout, self._spec),
            self._gates.get(layer),
            {"biases": self._biases.get(layer), "activation": self._activation},
        )
        return PendingExperts(self._stream, len(wanted), choices, self._work_beside)

    def resident(self, layer: int) -> Resident | None:
        """Where experts lie that have come; None where they may go again."""
        return self._residents.get(layer)

    def _resident(self, layer: int) -> Resident:
        return Resident(
            addresses=array("q", bytes(8 * self._spec.num_experts)),
            asked=self._usage.row(layer),
            hits=self._manager.unasked_hits,
            layout=self._layout,
            activation=self._activation,
            weight_on_input=self._spec.weight_on_input,
            biases=self._biases.get(layer),
        )

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """What `layer` will probably choose, [T, k]; the likeliest, as many as can be kept."""
        experts, counts = topk_ids.unique(return_counts=True)
        likeliest = experts[counts.argsort(descending=True, stable=True)]
        most = self._manager.capacity // 2
        self._guess = layer, likeliest[:most].tolist()
        if layer - 1 not in self._spec.moe_layers:
            self._send_guess(most)  # nothing else is under way

    def _work_beside(self, stream: Stream, lease: Lease | None) -> None:
        """Remember what came, where it stays; send for as much of a guess as there is room for."""
        if lease is not None and (resident := self._residents.get(lease.layer)) is not None:
            for expert, address in lease.addresses.items():
                resident.addresses[expert] = address
        if self._guess is not None:
            self._send_guess(stream.room)

    def _send_guess(self, room: int) -> None:
        if self._guess is not None and room:
            layer, experts = self._guess
            self._manager.prefetch(layer, experts[:room])
            self._guess = (layer, experts[room:]) if experts[room:] else None

    def cancel(self) -> None:
        """Let go of what was begun, if nobody asked for its result."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class Choices:
    """Which experts the tokens of one layer chose, and what those contribute."""

    def __init__(
        self,
        hidden: Tensor,  # [T, H]
        topk_ids: Tensor,  # [T, k]
        topk_weights: Tensor,  # [T, k]
        layout: ExpertLayout,
        spec: ModelFacts,
        gate: Gate | None,
        options: Mapping[str, Any],  # of the ops
    ) -> None:
        self._chosen = hidden, topk_ids, topk_weights
        self._num_experts = spec.num_experts
        self._layout, self._gate = layout, gate
        self._options = {**options, "weight_on_input": spec.weight_on_input}
        self._total: Tensor | None = None  # [T, k, H], once there is more than one group

    def compute_all(self, addresses: dict[int, int]) -> Tensor:
        """[T, H] where every expert lies somewhere."""
        if self._gate is not None:
            self.compute(addresses)
            return self.sum()
        hidden = self._chosen[0]
        out = torch.zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        ops.add_routed_experts(
            *(out, *self._chosen, address_table(addresses, self._num_experts), self._layout),
            **self._options,
        )
        return out.to(hidden.dtype)

    def compute(self, addresses: dict[int, int]) -> None:
        """What these experts contribute, given where they lie."""
        hidden, ids, weights = self._chosen
        if self._total is None:
            self._total = torch.zeros(*ids.shape, hidden.shape[-1])  # [T, k, H]
        table = address_table(addresses, self._num_experts)
        here = table[ids] != 0  # [T, k]
        if here.shape[0] <= _WHOLE_TOKENS or 2 * here.sum() > here.numel():
            self._total += self._contributions(*self._chosen, table)
            return
        tokens, slots = torch.where(here)  # [n] each
        some = hidden[tokens], ids[tokens, slots, None], weights[tokens, slots, None]  # n tokens
        self._total[tokens, slots] = self._contributions(*some, table)[:, 0]

    def sum(self) -> Tensor:
        """[T, H] of all groups together."""
        hidden = self._chosen[0]
        out = torch.zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        if self._total is not None:  # else there are no tokens
            ops.add_contributions(out, self._total, self._chosen[1])
        return out.to(hidden.dtype)

    def _contributions(self, hidden: Tensor, ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        """[tokens, choices, H]"""
        if self._gate is not None:
            return gated_experts(hidden, ids, weights, table, self._layout, self._gate)
        return ops.routed_experts(*(hidden, ids, weights, table, self._layout), **self._options)


class PendingExperts:
    """A Pending whose experts are on their way."""

    def __init__(
        self,
        stream: Stream,
        num_wanted: int,
        choices: Choices,
        beside: Callable[[Stream, Lease | None], None],
    ) -> None:
        """`beside` is told whenever the layer may have come to need fewer slots, and of a lease."""
        self._stream, self._num_wanted = stream, num_wanted
        self._choices, self._beside = choices, beside
        beside(stream, None)

    def result(self) -> Tensor:
        """[T, H]: computes group after group, while the next ones come."""
        for lease in self._stream:
            with lease:
                self._beside(self._stream, lease)
                if len(lease.addresses) == self._num_wanted:
                    return self._choices.compute_all(lease.addresses)
                self._choices.compute(lease.addresses)
        return self._choices.sum()
