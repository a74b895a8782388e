"""Knows how fast this machine computes experts: joins quant's ops and offload's measurements."""

import torch

from moecli import __version__
from offload.hardware import Machine
from offload.measured import HostCompute, with_bandwidths
from quant import ops
from quant.layout import ExpertLayout

# Experts are read from main memory at decode, so those measured must not fit a cache; but so many
# tiny ones would take long.
_SPREAD_NBYTES = 256 << 20
_MOST_EXPERTS = 64
_BYTE = 0x3C  # makes small scales: nothing overflows


def with_compute(
    machine: Machine, layout: ExpertLayout, top_k: int, measure: bool = True
) -> Machine:
    """`machine` with all bandwidths that it does not state, those of experts on the CPU too.

    Without `measure` only with those that were measured before. Takes torch's present number of
    threads.
    """
    return with_bandwidths(machine, expert_compute(layout, top_k), measure=measure)


def expert_compute(layout: ExpertLayout, top_k: int) -> HostCompute:
    """Experts of this kind on the CPU as a decode step asks for them: one token, `top_k` experts.

    With torch's present number of threads, and the backend that is chosen for the CPU.
    """
    name = (
        f"{layout.scheme.name} {layout.hidden_size}x{layout.intermediate_size} top-{top_k} "
        f"{ops.current_backend()} {torch.get_num_threads()} threads {__version__}"
    )
    blobs: list[torch.Tensor] = []

    def compute() -> int:
        if not blobs:  # on the first run, which warms up
            blobs.extend(_experts(layout, top_k))
        hidden = torch.ones(1, layout.hidden_size)  # [T, H]
        weights = torch.ones(1, top_k)  # [T, k]
        addresses = torch.tensor([blob.data_ptr() for blob in blobs])  # [E]
        steps = len(blobs) // top_k
        for step in range(steps):
            chosen = torch.arange(step * top_k, (step + 1) * top_k)[None]  # [T, k]
            ops.routed_experts(hidden, chosen, weights, addresses, layout)
        return steps * top_k * layout.nbytes

    return HostCompute(name, compute)


def _experts(layout: ExpertLayout, top_k: int) -> list[torch.Tensor]:
    """Made-up experts, uint8 [nbytes] each."""
    wanted = min(-(-_SPREAD_NBYTES // layout.nbytes), _MOST_EXPERTS)
    count = max(1, wanted // top_k) * top_k
    return [torch.full((layout.nbytes,), _BYTE, dtype=torch.uint8) for _ in range(count)]
