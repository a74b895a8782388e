"""Knows the cases of captured steps: the same step, repeated by a graph and launched anew.

Legend: L MoE layers, E experts a layer, k choices, H hidden.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from moecli import graphs
from moecli.checks.compare import Mismatch, equal, kernels_chosen, random
from moecli.checks.lanes import pinned_slots, pinner_of
from moecli.checks.quantized import make_experts
from moecli.models.fused import add_rms_norm
from moecli.selfcheck import Case
from offload.device_cache import DeviceCache
from offload.host_lane import HostLane
from quant import ops
from quant.layout import ExpertLayout
from quant.scheme import QuantScheme

_LAYERS, _EXPERTS, _CHOICES, _SLOTS = 2, 4, 2, 3
_LAYOUT = ExpertLayout(128, 64, QuantScheme(4, 32))
_STEPS = 3


_PINNED = [(0, 0), (0, 2), (1, 1)]


def capture_on(device: torch.device) -> graphs.Capture:
    return graphs.captured if device.type == "cuda" else graphs.eager


class _Model:
    """A small stack of routed experts over a cache, all on the device."""

    def __init__(
        self, device: torch.device, stack: ExitStack, placement: str, with_host: bool
    ) -> None:
        arena = stack.enter_context(pinned_slots(device, _LAYERS * _EXPERTS, _LAYOUT.slot_nbytes))
        blobs = make_experts(_LAYOUT, _LAYERS * _EXPERTS)
        for slot, blob in enumerate(blobs):
            ctypes.memmove(arena.address(slot), blob.data_ptr(), _LAYOUT.nbytes)
        seen = torch.tensor([arena.device_address(slot) for slot in range(arena.num_slots)])
        shape = (_LAYERS, _EXPERTS)
        links = torch.arange(65, dtype=torch.int32) // (2 if with_host else 1)
        self.cache = DeviceCache(
            *(*shape, _SLOTS, _LAYOUT.slot_nbytes, _LAYOUT.nbytes, device, seen.view(shape)),
            *(placement, links, [0, *[_LAYOUT.nbytes // 3] * 64], _CHOICES),
        )
        stack.callback(self.cache.close)
        if placement == "pinned":
            whole = {(i // _EXPERTS, i % _EXPERTS): blob for i, blob in enumerate(blobs)}
            self.cache.load(_PINNED, lambda key: whole[key].numpy().data)
        self._lane: HostLane | None = None
        if with_host:
            self._lane = HostLane(
                *(_LAYOUT.hidden_size, _EXPERTS, _CHOICES, 1, self._serve, device),
                pinner_of(device),
            )
            stack.callback(self._lane.close)
            stack.enter_context(self._lane.armed())
        self._routing = random(8, _EXPERTS, seed=9).topk(_CHOICES).indices.to(device)
        self._weights = torch.full((1, _CHOICES), 0.5, device=device)
        self._norm = torch.ones(_LAYOUT.hidden_size, device=device)
        self._begin = random(1, _LAYOUT.hidden_size, seed=8).to(device)
        self.state = self._begin.clone()  # [1, H]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def reset(self) -> None:
        self.state.copy_(self._begin)
        self.position.zero_()

    def step(self) -> None:
        for layer_index in range(_LAYERS):
            rows = (self.position + layer_index) % self._routing.shape[0]
            ids = self._routing.index_select(0, rows)  # [1, k]
            self.state.add_(self._experts(layer_index, ids))
        self.position.add_(1)

    def _experts(self, layer_index: int, ids: Tensor) -> Tensor:
        x = add_rms_norm(self.state, torch.zeros_like(self.state), self._norm, 1e-6)
        self.cache.resolve(layer_index, ids)
        if self._lane is not None:
            self._lane.ring(layer_index, x, ids, self._weights, self.cache.host_mask)
        self.cache.fetch()
        out = torch.zeros_like(x)
        addresses = self.cache.step_addresses
        ops.add_routed_experts(out, x, ids, self._weights, addresses, _LAYOUT)
        if self._lane is not None:
            out = out + self._lane.wait()[0]
        return out

    def _serve(
        self, layer_index: int, x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        """Not computed as on the device: the host has no kernels to be asked about here."""
        weight = (weights * mask.bool()[ids]).sum(dim=1, keepdim=True)  # [1, 1]
        return x * weight * (layer_index + 1), None


def _compare(model: _Model, capture: graphs.Capture) -> None:
    expected = []
    for _ in range(_STEPS):
        model.step()
        expected.append(model.state.clone())
    replay = capture(model.step)
    model.reset()
    for number, state in enumerate(expected):
        replay()
        equal(f"step {number}", model.state, state)
    if int(model.position) != _STEPS:
        raise Mismatch(f"{_STEPS} replays advanced the position to {int(model.position)}")


def captures(device: torch.device) -> bool:
    """Whether a graph of one small operation works: without it nothing is said of other paths."""
    count = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        count.add_(1)

    try:
        replay = capture_on(device)(step)
        count.zero_()
        replay()
        replay()
        return int(count) == 2
    except RuntimeError:
        return False


def step_case(placement: str, with_host: bool, own: bool) -> Callable[[torch.device], None]:
    """Some steps launched one by one, then the same from the beginning as replays.

    `own`: that graphs work at all is for this case to find out.
    """

    def run(device: torch.device) -> None:
        if not own and not captures(device):
            return
        with ExitStack() as stack:
            stack.enter_context(kernels_chosen(device))
            # Made before inference mode: what a thread writes must be no inference tensor.
            model = _Model(device, stack, placement, with_host)
            with torch.inference_mode():
                _compare(model, capture_on(device))

    return run


def graph_cases() -> Iterator[Case]:
    yield Case("graph", "a captured step", step_case("pinned", with_host=False, own=True))
    yield Case("fetch", "fetches in a captured step", step_case("lru", with_host=False, own=False))
    asking = step_case("pinned", with_host=True, own=False)
    yield Case("doorbell", "requests in a captured step", asking)
