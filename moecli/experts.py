"""Knows how routed experts are computed where they lie: joins quant's ops and offload's manager."""

import torch
from torch import Tensor

from moecli.expert_math import address_table
from moecli.models.config import ModelSpec
from moecli.models.provider import Ready
from offload.manager import ExpertManager
from offload.usage import ExpertUsage
from quant import ops
from quant.layout import ExpertLayout

_AHEAD_SLOTS = 4  # slots that a token's choice must have for reading ahead to pay


class OffloadedExperts:
    """An ExpertProvider over an ExpertManager: ensure, compute, release, in as many waves as fit.

    Legend: T tokens, k choices a token, H hidden size, E experts a layer.
    """

    def __init__(
        self, manager: ExpertManager, layout: ExpertLayout, spec: ModelSpec, usage: ExpertUsage
    ) -> None:
        """`usage` counts what is asked for here."""
        self._manager = manager
        self._usage = usage
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
        total = torch.zeros(*topk_ids.shape, hidden.shape[-1], dtype=torch.float32)  # [T, k, H]
        wanted = sorted(set(topk_ids.flatten().tolist()))
        self._usage.add(layer, wanted)
        for wave in self._manager.waves(layer, wanted):
            with self._manager.ensure(layer, wave) as lease:
                total += ops.routed_experts(
                    hidden,
                    topk_ids,
                    topk_weights,
                    address_table(lease.addresses, self._num_experts),
                    self._layout,
                    weight_on_input=self._weight_on_input,
                )
        return Ready(total.sum(dim=1).to(hidden.dtype))  # [T, H]

    def prefetch(self, layer: int, topk_ids: Tensor) -> None:
        """Start reading what `layer` will probably choose, [T, k]; returns at once."""
        self._manager.prefetch(layer, sorted(set(topk_ids.flatten().tolist())))
