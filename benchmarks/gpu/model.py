"""Knows how a model of random weights is put on a device by moecli's own parts, as a plan says.

Its routers follow a trace; see trace_router. Nothing is read from disk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.kernels import random_weight
from benchmarks.gpu.random_experts import RandomExperts
from benchmarks.gpu.roofline import Bandwidths
from benchmarks.gpu.sizes import ModelArm
from benchmarks.gpu.trace_router import Clock, Trace, TraceRouter
from moecli.dense import DenseWeight
from moecli.device import DeviceParts, DeviceSettings
from moecli.device_tiers import MakeArena
from moecli.favourites import Favourites
from moecli.footprint import expert_layout, model_footprint
from moecli.graphs import Capture
from moecli.models.batch import Batch
from moecli.models.config import ModelSpec
from moecli.models.moe import MoeBlock
from moecli.opening_device import open_device
from moecli.session import Session
from offload.hardware import Machine, detect
from offload.host import HostArena
from offload.pinning import CudaPinner, Pinner, SimulatedPinner
from offload.plan import MemoryPlan, ModelFootprint, make_plan
from quant.layout import ExpertLayout

PREFILL_CHUNK = 4096
_SPREAD, _ROWS = 0.02, 64  # of the embedding and routers


def pinner_of(device: torch.device) -> Pinner:
    return CudaPinner(device) if device.type == "cuda" else SimulatedPinner()


class KeptArena:
    """Main memory that is taken and pinned once for all arms of a model.

    For tens of GiB that takes longer than what is measured.
    """

    def __init__(self, nbytes: int, slot_nbytes: int, pinner: Pinner) -> None:
        self._arena = HostArena(nbytes, slot_nbytes)
        self._arena.pin(pinner)

    def lend(self, nbytes: int, slot_nbytes: int) -> HostArena:
        assert slot_nbytes == self._arena.slot_nbytes, "slots of another size"
        assert nbytes <= self._arena.nbytes, "more memory than was kept"
        return _Lent(self._arena, nbytes // slot_nbytes)

    @property
    def pinned_slots(self) -> int:
        return self._arena.pinned_slots

    def close(self) -> None:
        self._arena.close()


class _Lent(HostArena):
    """The first slots of an arena, as an arena that is pinned already and outlives its close."""

    def __init__(self, arena: HostArena, num_slots: int) -> None:
        """Takes no memory of its own."""
        self._arena, self.num_slots, self.slot_nbytes = arena, num_slots, arena.slot_nbytes

    @property
    def pinned_slots(self) -> int:
        return min(self.num_slots, self._arena.pinned_slots)

    def pin(self, pinner: Pinner, step_nbytes: int = 0) -> int:
        return self.pinned_slots

    def buffer(self, slot: int) -> memoryview:
        return self._arena.buffer(slot)

    def address(self, slot: int) -> int:
        return self._arena.address(slot)

    def device_address(self, slot: int) -> int:
        return self._arena.device_address(slot)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Subject:
    """A model to measure: its sizes and the machine that plans are made for."""

    arm: ModelArm
    spec: ModelSpec
    layout: ExpertLayout
    footprint: ModelFootprint
    machine: Machine
    device: torch.device

    @classmethod
    def of(cls, arm: ModelArm, device: torch.device, rates: Bandwidths | None) -> "Subject":
        spec = ModelSpec.from_hf(arm.config)
        schemes = (arm.scheme, arm.dense_scheme)
        footprint = model_footprint(spec, *schemes, arm.ctx, min(PREFILL_CHUNK, arm.ctx))
        machine = detect(gpu=device.type == "cuda")
        if rates is not None:
            machine = replace(
                machine,
                ram_bw=rates.ram,
                link_bw=rates.link,
                zero_copy_bw=rates.link_kernel,
                host_bw=rates.host_experts,
                vram_bw=rates.vram,
            )
        return cls(arm, spec, expert_layout(spec, arm.scheme), footprint, machine, device)

    def plan(self, vram_nbytes: int, placement: str, lane: str) -> MemoryPlan:
        """All experts that VRAM lacks are in main memory."""
        ram = self.footprint.embedding_nbytes
        ram += (self.footprint.total_experts + 2) * self.footprint.slot_nbytes
        return make_plan(
            *(self.footprint, self.machine, ram, vram_nbytes), placement=placement, lane=lane
        )

    def keep_arena(self) -> KeptArena:
        nbytes = self.footprint.total_experts * self.footprint.slot_nbytes
        return KeptArena(nbytes, self.footprint.slot_nbytes, pinner_of(self.device))

    def experts(self) -> RandomExperts:
        numbers = range(self.spec.num_experts)
        keys = [(layer, expert) for layer in self.spec.moe_layers for expert in numbers]
        return RandomExperts(self.layout, keys, self.device)

    def weights(self) -> Callable[[str], DenseWeight]:
        """Dense weights that nobody trained, made on the device when they are asked for."""
        tensors = {tensor.name: tensor for tensor in self.spec.dense_tensors}

        def load(name: str) -> DenseWeight:
            tensor = tensors[name]
            if tensor.linear:
                return random_weight(*tensor.shape, self.arm.dense_scheme, self.device)
            if len(tensor.shape) == 1:
                return torch.ones(tensor.shape, dtype=torch.bfloat16)
            # In main memory, where the embedding may have to stay; a few rows serve for all.
            count, width = tensor.shape
            rows = (torch.randn(_ROWS, width) * _SPREAD).bfloat16()
            return rows.repeat(-(-count // _ROWS), 1)[:count].contiguous()

        return load


class Run:
    """One placement of a model, ready to be timed. Close it."""

    def __init__(
        self,
        subject: Subject,
        plan: MemoryPlan,
        choices: Tensor,
        capture: Capture,
        make_arena: MakeArena,
    ) -> None:
        """choices int64 [P, L, k]: the trace that routers follow."""
        device = subject.device
        on_cuda = device.type == "cuda"
        dtype = torch.bfloat16 if on_cuda else torch.float32
        self.notes: list[str] = []
        self.subject, self.plan = subject, plan
        settings = DeviceSettings(
            device,
            dtype,
            torch.bfloat16,
            subject.arm.ctx,
            capture,
            pinner_of(device),
            make_arena=make_arena,
        )
        self.parts: DeviceParts = open_device(
            subject.spec,
            subject.layout,
            plan,
            subject.weights(),
            subject.experts(),
            settings,
            self.notes.append,
            Favourites(None, subject.spec, self.notes.append),
        )
        self.trace = Trace(choices, device)
        self.clock = Clock(device)
        self._follow_trace()

    def _follow_trace(self) -> None:
        index = 0
        for layer in self.parts.decoder.layers:
            layer.lookahead = None  # it would ask routers whose choices count for nothing here
            if isinstance(layer.mlp, MoeBlock):
                layer.mlp.router = TraceRouter(layer.mlp.router, self.trace, self.clock, index)
                index += 1

    @torch.inference_mode()
    def prefill(self, session: Session, num_tokens: int) -> Tensor:
        """Logits [V] after so many tokens, in chunks as the engine reads a prompt."""
        vocab = self.subject.spec.vocab_size
        logits = None
        if not session.tokens:
            self.clock.restart()
        while num_tokens:
            count = min(num_tokens, PREFILL_CHUNK)
            ids = [(len(session.tokens) + i) % vocab for i in range(count)]
            self.parts.begin_step()
            tokens = torch.tensor(ids, device=self.subject.device)
            logits = self.parts.decoder.forward(Batch.of(tokens, session.cache))
            session.tokens.extend(ids)
            num_tokens -= count
        assert logits is not None, "a prompt without tokens"
        return logits[0]

    def close(self) -> None:
        self.parts.close()
