"""Knows how routed experts are computed where they lie: joins quant's ops and offload's manager."""

import torch
from torch import Tensor

from moecli.models.config import ModelSpec
from moecli.models.provider import Ready
from offload.manager import ExpertManager
from quant import ops
from quant.layout import ExpertLayout

_AHEAD_SLOTS = 4  # slots that a token's choice must have for reading ahead to pay


class OffloadedExperts:
    """An ExpertProvider over an ExpertManager: ensure, compute, release, in as many waves as fit.

    Legend: T tokens, k choices a token, H hidden size, E experts a layer.
    """

    def __init__(self, manager: ExpertManager, layout: ExpertLayout, spec: ModelSpec) -> None:
        self._manager = manager
        self._layout = layout
        self._num_experts = spec.num_experts
        self._weight_on_input = spec.weight_on_input
        total = len(spec.moe_layers) * spec.num_experts
        # With fewer slots a guess is evicted before it is asked for: on the demo model 84% of
        # what 2 slots read ahead was wasted, 26% of what 12 did.
        worthwhile = range(_AHEAD_SLOTS * spec.experts_per_token, total)
        self.reads_ahead = manager.keep and manager.capacity in worthwhile

    def begin(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ready:
        """[T, H] from hidden [T, H], topk_ids [T, k], topk_weights [T, k]; computed at once.

        Each (token, choice) is computed in exactly one wave and is zero in the others, so the sum
        over waves is exact and the result does not depend on what was resident.
        """
        out = torch.zeros(hidden.shape, dtype=torch.float32)  # [T, H]
        choices = (hidden, topk_ids, topk_weights)
        waves = list(self._manager.waves(layer, sorted(set(topk_ids.flatten().tolist()))))
        if len(waves) == 1:
            with self._manager.ensure(layer, waves[0]) as lease:
                ops.add_routed_experts(
                    *(out, *choices, self._table(lease.addresses), self._layout),
                    weight_on_input=self._weight_on_input,
                )
        else:
            total = torch.zeros(*topk_ids.shape, hidden.shape[-1])  # [T, k, H]
            for wave in waves:
                with self._manager.ensure(layer, wave) as lease:
                    total += ops.routed_experts(
                        *(*choices, self._table(lease.addresses), self._layout),
                        weight_on_input=self._weight_on_input,
                    )
            ops.add_contributions(out, total, topk_ids)
        return Ready(out.to(hidden.dtype))  # [T, H]

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """Start reading what `layer` will probably choose, [T, k]; returns at once."""
        self._manager.prefetch(layer, sorted(set(topk_ids.flatten().tolist())))

    def _table(self, addresses: dict[int, int]) -> Tensor:
        table = torch.zeros(self._num_experts, dtype=torch.int64)  # [E]
        for expert, address in addresses.items():
            table[expert] = address
        return table
