"""Knows how fast this machine computes experts: joins quant's ops and offload's measurements."""

from pathlib import Path

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
# At decode few tokens pass a layer in compiled calls; those measured begin in Python, which tiny
# experts would not be worth: so a call has as much work as makes that small.
_CALL_NBYTES = 1 << 20
_BYTE = 0x3C  # makes small scales: nothing overflows


def with_compute(
    machine: Machine,
    layout: ExpertLayout,
    top_k: int,
    measure: bool = True,
    shared_by: int = 0,
    disk: Path | None = None,
) -> Machine:
    """`machine` with all bandwidths that it does not state, those of experts on the CPU too, and
    that of the disk on which `disk` lies, a file or a directory that may be written to.

    Without `measure` only with those that were measured before. Takes torch's present number of
    threads. `shared_by`: see `expert_compute`.
    """
    host = expert_compute(layout, top_k, shared_by)
    return with_bandwidths(machine, host, measure=measure, disk=disk)


def largest_file(path: Path) -> Path | None:
    """Of a model's directory, the file that its disk is measured with; None where none has weights.

    Nothing is ever written there.
    """
    return max(path.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)


def expert_compute(layout: ExpertLayout, top_k: int, shared_by: int = 0) -> HostCompute:
    """Experts of this kind on the CPU as a decode step asks for them: one token, `top_k` experts,
    or as many more as make one call's own cost small.

    And as a prompt does, where `shared_by` tokens share each; 0: that is not asked for. With
    torch's present number of threads, and the backend that is chosen for the CPU.
    """
    at_once = max(top_k, min(-(-_CALL_NBYTES // layout.nbytes), _MOST_EXPERTS))
    name = (
        f"{layout.scheme.name} {layout.hidden_size}x{layout.intermediate_size} {at_once} at once "
        f"{ops.current_backend()} {torch.get_num_threads()} threads {__version__}"
    )
    blobs: list[torch.Tensor] = []

    def addresses_of_all() -> torch.Tensor:
        if not blobs:  # on the first run, which warms up
            blobs.extend(_experts(layout, at_once))
        return torch.tensor([blob.data_ptr() for blob in blobs])  # [E]

    def compute() -> int:
        addresses = addresses_of_all()
        hidden = torch.ones(1, layout.hidden_size)  # [T, H]
        weights = torch.ones(1, at_once)  # [T, k]
        steps = len(blobs) // at_once
        for step in range(steps):
            chosen = torch.arange(step * at_once, (step + 1) * at_once)[None]  # [T, k]
            ops.routed_experts(hidden, chosen, weights, addresses, layout)
        return steps * at_once * layout.nbytes

    def share() -> int:
        addresses = addresses_of_all()
        tokens = max(1, shared_by * len(blobs) // top_k)
        chosen = (torch.arange(tokens * top_k) % len(blobs)).view(tokens, top_k)  # [T, k]
        weights = torch.ones(tokens, top_k)
        hidden = torch.ones(tokens, layout.hidden_size)
        ops.routed_experts(hidden, chosen, weights, addresses, layout)
        return 2 * chosen.numel() * layout.num_weights

    return HostCompute(name, compute, share if shared_by else None, shared_by)


def _experts(layout: ExpertLayout, at_once: int) -> list[torch.Tensor]:
    """Made-up experts for whole calls, uint8 [nbytes] each."""
    wanted = min(-(-_SPREAD_NBYTES // layout.nbytes), _MOST_EXPERTS)
    count = max(1, wanted // at_once) * at_once
    return [torch.full((layout.nbytes,), _BYTE, dtype=torch.uint8) for _ in range(count)]
