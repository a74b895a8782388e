"""Knows how disk, main memory and VRAM are filled with experts, exactly as the plan says.

Legend: L MoE layers, E experts of a layer, I intermediate.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moecli.models.config import ModelSpec
from offload.device_cache import MAX_CHOICES, DeviceCache
from offload.disk import DiskTier
from offload.host import HostArena
from offload.keys import ExpertKey
from offload.manager import ExpertManager
from offload.pieces import Piece, worth_copying
from offload.pinning import Pinner
from offload.plan import MemoryPlan
from offload.slots import SlotPool
from quant.kernels.experts import memory_at
from quant.layout import ExpertLayout

Progress = Callable[[int, int], None]  # experts in place, of so many
MakeArena = Callable[[int, int], HostArena]  # of so many bytes, in slots of so many
_HOST = torch.device("cpu")
_AT_ONCE = 8  # experts read together


class DeviceTiers:
    """The experts of a model in their places.

    Owns what it makes, and `disk`. `whole` says where the device reads each expert in main memory,
    int64 [L, E]; 0: it cannot. `cache` holds whole experts in VRAM, `slices` the address of a
    slice of every expert there, int64 [L, E]; one of the two is None.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: ExpertLayout,
        plan: MemoryPlan,
        disk: DiskTier,
        device: torch.device,
        pinner: Pinner,
        favourites: Sequence[ExpertKey] = (),
        progress: Progress = lambda done, total: None,
        make_arena: MakeArena = HostArena,
        copies_parts: bool = True,
    ) -> None:
        """`favourites`: experts (layer, expert) that VRAM shall hold first, the most wanted first;
        where there are too few, the others follow, one of each layer in turn. `copies_parts`: of
        an expert whose slice is in VRAM a prompt brings the other rows alone, else all of them.
        """
        self.spec, self.layout, self.plan, self.device = spec, layout, plan, device
        self._progress = progress
        self._done = self._to_do = 0  # experts brought to their places
        self._index = {layer: index for index, layer in enumerate(spec.moe_layers)}
        arena = make_arena(plan.host_arena_nbytes, plan.slot_nbytes)
        arena.pin(pinner)
        self.pinned_nbytes, self.arena_nbytes = arena.pinned_slots * arena.slot_nbytes, arena.nbytes
        self._disk = disk
        staging = None
        if plan.staging_slots:
            pieces = self._not_in_slices() if plan.slice_size and copies_parts else None
            staging = SlotPool(plan.staging_slots, plan.slot_nbytes, device, pieces=pieces)
        self.manager = ExpertManager(disk, arena, staging)
        self.cache: DeviceCache | None = None
        self.slices: Tensor | None = None
        self._slice_pool: SlotPool | None = None
        self.settled = False  # main memory holds all that VRAM does not, and nothing moves there
        self.whole = torch.zeros(0, dtype=torch.int64)
        try:
            self._place(list(favourites))
        except BaseException:
            self.close()
            raise

    def _not_in_slices(self) -> tuple[Piece, ...]:
        """What a prompt still needs of an expert whose slice is in VRAM."""
        rest = self.layout.runs(self.plan.slice_size, self.layout.intermediate_size)
        return worth_copying(Piece(*runs) for runs in rest)

    @property
    def slice_layout(self) -> ExpertLayout:
        return self.layout.restricted(0, self.plan.slice_size)

    @property
    def link_end(self) -> int:
        """Where the inner rows end that the device computes of a sliced expert."""
        return self.plan.slice_size + self.plan.link_size

    def host_rows(self, layer: int, expert: int) -> tuple[int, int]:
        """The inner rows of a sliced expert that the device leaves to the host."""
        begin = self.link_end if self._view(layer, expert) else self.plan.slice_size
        return begin, self.layout.intermediate_size

    def _view(self, layer: int, expert: int) -> int:
        """Where the device reads an expert in main memory for good; 0: nowhere."""
        return self.manager.link_address(layer, expert) if self.settled else 0

    def _whole(self) -> Tensor:
        views = [self._view(*key) for key in self._all_keys()]
        return torch.tensor(views, dtype=torch.int64).view(len(self._index), -1).to(self.device)

    @property
    def all_reachable(self) -> bool:
        """Whether the device reads every expert, from VRAM or from main memory."""
        resident = self.residents()
        absent = [key for key in self._all_keys() if key not in resident]
        return all(self._view(*key) for key in absent)

    @property
    def needs_host(self) -> bool:
        """Whether some expert is the host's to compute, or to bring."""
        plan = self.plan
        if plan.device_slots >= plan.total_experts:
            return False
        return "host" in plan.lanes or not self.all_reachable

    def file_bytes(self, key: ExpertKey) -> bytes:
        """The bytes of an expert (layer, expert) as the disk has them, for checks."""
        with mmap.mmap(-1, self.plan.slot_nbytes) as page, memoryview(page) as buffer:
            nbytes = self._disk.read_into(key, buffer)
            return bytes(buffer[:nbytes])

    def residents(self) -> dict[ExpertKey, int]:
        """Whole experts (layer, expert) in VRAM outside of staging, and where. Waits for it."""
        if self.cache is None:
            return {}
        layers, found = self.spec.moe_layers, self.cache.snapshot()
        return {(layers[index], expert): address for (index, expert), address in found.items()}

    def _place(self, favourites: list[ExpertKey]) -> None:
        plan, keys = self.plan, self._all_keys()
        if plan.placement == "slice":
            self.settled = plan.host_slots >= len(keys)
            self._to_do = len(keys)
            self._cut_slices(keys)
            self.slices = self._slice_table(keys)
            self.whole = self._whole()
            return
        first = list(dict.fromkeys([*favourites, *_in_turn(keys)]))[: plan.device_slots]
        self._fill_slots(first, keys)

    def _fill_slots(self, first: list[ExpertKey], keys: list[ExpertKey]) -> None:
        """VRAM begins with `first`, the most wanted first; RAM has those that VRAM may lack."""
        plan = self.plan
        cache = self.cache = DeviceCache(
            len(self._index),
            self.spec.num_experts,
            plan.device_slots,
            plan.slot_nbytes,
            self.layout.nbytes,
            self.device,
            torch.zeros(len(self._index), self.spec.num_experts, dtype=torch.int64),
            "pinned" if plan.placement == "pinned" else "lru",
            torch.tensor(plan.link_counts, dtype=torch.int32),
            plan.link_idle,
            MAX_CHOICES,
        )
        stays = plan.placement == "pinned" or len(first) == len(keys)
        staying = set(first) if stays else set()
        rest = [key for key in keys if key not in staying]
        self.settled = plan.host_slots >= len(rest)
        self._to_do = len(first) + (len(rest) if self.settled else 0)
        if stays:
            self._load(cache, sorted(first))  # as the file has them
        if self.settled:
            for _ in self._pass(rest):
                pass
        self.whole = self._whole()
        cache.host_addresses.copy_(self.whole)
        if not stays:
            self._load(cache, first[::-1])  # the last one is the last to be evicted

    def _load(self, cache: DeviceCache, keys: list[ExpertKey]) -> None:
        """Bring these to slots, one after the other."""
        for (layer, expert), address in self._pass(keys):
            here = {(self._index[layer], expert): self._bytes(address)}
            cache.load(list(here), here.__getitem__)

    def _cut_slices(self, keys: list[ExpertKey]) -> None:
        size, nbytes = self.plan.slice_size, self.plan.slice_nbytes
        pool = self._slice_pool = SlotPool(len(keys), nbytes, self.device)
        cut = torch.zeros(nbytes, dtype=torch.uint8)
        for slot, (_, address) in enumerate(self._pass(keys)):
            self.layout.cut(memory_at(address, self.layout.nbytes, _HOST), 0, size, cut)
            pool.copy_in(slot, cut.numpy().data)

    def _slice_table(self, keys: list[ExpertKey]) -> Tensor:
        assert self._slice_pool is not None, "no slices"
        places = [self._slice_pool.address(slot) for slot in range(len(keys))]
        return torch.tensor(places).view(len(self._index), -1).to(self.device)

    def _pass(self, keys: list[ExpertKey]) -> Iterator[tuple[ExpertKey, int]]:
        """Each expert and where it lies in main memory, valid until the next; in this order."""
        for layer, experts in _runs(keys, min(_AT_ONCE, self.plan.host_slots)):
            with self.manager.lease_host(layer, experts) as lease:
                for expert in experts:
                    yield (layer, expert), lease.addresses[expert]
            self._done += len(experts)
            self._progress(self._done, self._to_do)

    def _bytes(self, address: int) -> memoryview:
        return memory_at(address, self.layout.nbytes, _HOST).numpy().data

    def _all_keys(self) -> list[ExpertKey]:
        return [(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.num_experts)]

    def close(self) -> None:
        self.manager.close()
        if self.cache is not None:
            self.cache.close()
        if self._slice_pool is not None:
            self._slice_pool.close()


def _in_turn(keys: list[ExpertKey]) -> list[ExpertKey]:
    """The first expert of each layer, then the second of each."""
    return sorted(keys, key=lambda key: (key[1], key[0]))


def _runs(keys: list[ExpertKey], length: int) -> Iterator[tuple[int, list[int]]]:
    """Keys in their order, those of one layer that follow each other together."""
    run: list[int] = []
    layer = -1
    for of_layer, expert in keys:
        if run and (of_layer != layer or len(run) == length):
            yield layer, run
            run = []
        layer = of_layer
        run.append(expert)
    if run:
        yield layer, run
