"""The two ops of a device cache: kernels against references, at sizes of real models too."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload import device_ops
from offload.device_cache import DeviceCache, LaneCounts
from tests.devices import DEVICE, reachable
from tests.offload.device_twin import Experts, HostTwin, step

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _backend_as_it_was() -> Iterator[None]:
    yield
    device_ops.set_backend("auto")


def state(cache: DeviceCache) -> dict[str, list[Any]]:
    """All that a step leaves behind, slots told by their number and not their address."""
    count = int(cache._fetch_count[0]) + bool(cache._fetch_count[1])
    base = cache._slots.data_ptr()
    tables = ("_slot_of", "_owner", "_stamp", "_clock", "_counters", "_requests", "host_mask")
    tables += ("_arrival", "_fetch_count")
    found = {name: getattr(cache, name).tolist() for name in tables}
    found["fetch_src"] = cache._fetch_src[:count].tolist()
    found["fetch_slot"] = [a - base for a in cache._fetch_dst[:count].tolist()]
    in_slots = range(base, base + cache.nbytes)
    steps = cache.step_addresses.tolist()
    found["steps"] = [("slot", a - base) if a in in_slots else ("host", a) for a in steps]
    return found


@pytest.mark.parametrize("num_slots", [1, 65, 437])
def test_kernel_and_reference_leave_the_same_state(
    num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More slots than one sweep's columns, more experts than choices, up to 64 choices."""
    pytest.importorskip("triton")
    from offload.kernels import resolve

    monkeypatch.setattr(resolve, "MAX_COLUMNS", 64)
    experts = Experts(3, 150)
    counts = [m - m // 3 for m in range(65)]
    idle = [16 * (m % 3) for m in range(65)]
    caches = {name: experts.cache(num_slots, "lru", counts, 64, idle) for name in BACKENDS}
    generator = torch.Generator().manual_seed(num_slots)
    for turn in range(10):
        size = (1, 3, 8, 24, 64)[turn % 5]
        ids = torch.randint(0, 150 if turn % 3 else 30, (size,), generator=generator)
        for name, cache in caches.items():
            device_ops.set_backend(name)
            cache.resolve(turn % 3, ids.view(-1, 1).to(DEVICE))
            cache.fetch()
        assert state(caches["triton"]) == state(caches["torch"])
    caches["triton"].check_integrity(experts.read)
    assert caches["triton"].num_arrived or num_slots == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_thousand_slots_follow_the_hosts_policy(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    device_ops.set_backend(backend)
    experts = Experts(40, 512)
    cache = experts.cache(20000, max_choices=64)
    twin = HostTwin(cache)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(40 * 512, generator=generator)[:19990].tolist()
    warm = [divmod(number, 512) for number in order]
    cache.load(warm, experts.read)
    twin.load(warm)
    for layer in range(4):
        ids = torch.randint(0, 512, (64,), generator=generator).tolist()
        residents = cache.snapshot()
        ids[::5] = [e for e in range(512) if (layer, e) not in residents][:8] + [7] * 5
        assert step(cache, layer, ids) == twin.step(layer, ids)
    total = sum(cache.counters(), LaneCounts())
    assert total.fetched > 20
    assert total.hits > 100
    cache.check_integrity(experts.read)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_experts", [1, 3, 40])
def test_copies_of_many_blocks_are_whole_and_touch_nothing_else(
    backend: str, num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer programs than blocks, a last block that is not full, a list longer than its count."""
    triton = pytest.importorskip("triton")
    from offload.kernels import fetch

    monkeypatch.setattr(fetch, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(fetch, "BLOCK", 64)
    assert triton is not None
    device_ops.set_backend(backend)
    nbytes, slot_nbytes, rest = 64 * 4 * 2 + 48, 1024, 64 * 4 + 32
    source = reachable(torch.randint(0, 256, (num_experts, nbytes), dtype=torch.uint8))
    slots = torch.full((num_experts * slot_nbytes,), 7, dtype=torch.uint8, device=DEVICE)
    number = torch.arange(num_experts, device=DEVICE)
    src = source.data_ptr() + number * nbytes
    dst = slots.data_ptr() + number.flip(0) * slot_nbytes
    num_copies = max(1, num_experts - 1)
    pieces = 0 if num_copies == num_experts else rest // 16
    count = torch.tensor([num_copies, pieces], dtype=torch.int32, device=DEVICE)
    torch.ops.moecli_offload.fetch(src, dst, count, nbytes, slots)
    expected = torch.full((num_experts, slot_nbytes), 7, dtype=torch.uint8)
    expected[:num_copies, :nbytes] = source[:num_copies]
    expected[num_copies:, :rest] = source[num_copies:, :rest]
    assert torch.equal(slots.cpu().view(num_experts, slot_nbytes).flip(0), expected)


class Recorder(TorchDispatchMode):
    """What a graph would hold: the ops that reach the dispatcher, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("placement", ["lru", "pinned"])
def test_a_step_is_two_ops_that_can_be_replayed(placement: str) -> None:
    experts = Experts(2, 6)
    cache = experts.cache(3, placement)
    twin = HostTwin(cache)
    ids = torch.tensor([[0, 5]], device=DEVICE)
    with Recorder() as recorder:
        cache.resolve(1, ids)
        cache.fetch()
    names = [func._schema.name for func, _ in recorder.calls]
    assert names == ["moecli_offload::resolve", "moecli_offload::fetch"][: len(names)]
    assert len(names) == 2 or placement == "pinned"
    twin.step(1, [0, 5])
    for again in ([1, 5], [2, 2], [3, 1], [4, 5]):
        ids.copy_(torch.tensor([again]))
        for func, args in recorder.calls:
            func(*args)
        addresses, host = twin.step(1, again)
        assert {e: a for e, a in enumerate(cache.step_addresses.tolist()) if a} == addresses
        assert not host
        cache.check_integrity(experts.read)


@pytest.mark.parametrize("backend", BACKENDS)
def test_schemas_and_shape_functions_are_true(backend: str) -> None:
    """An op that wrote into an argument its schema does not name would break captured steps.

    The check copies the arguments; addresses would lead out of the copies, so nothing is fetched.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    device_ops.set_backend(backend)
    cache = Experts(2, 6).cache(3)
    with Recorder() as recorder:
        cache.resolve(1, torch.tensor([4, 4, 0], device=DEVICE))
        cache.fetch()
        cache.resolve(0, torch.tensor([1, 5, 2], device=DEVICE))
    cache._fetch_count.zero_()
    checks = ("test_schema", "test_faketensor")
    for func, args in recorder.calls:
        result = torch.library.opcheck(func, args, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from offload.kernels.fetch import BLOCK, fetch_kernel
from offload.kernels.resolve import resolve_kernel

def compiled(kernel, constants, arch):
    types = {"layer_index": "i32", "slots_address": "i64", "slot_nbytes": "i64",
             "num_choices": "i32", "num_experts": "i32", "num_slots": "i32", "num_pieces": "i32",
             "count": "*i32", "fetch_count": "*i32", "slot_of": "*i32", "owner": "*i32",
             "link_counts": "*i32", "link_idle": "*i32", "host_mask": "*i32"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*i64") for n in names}
    source = ASTSource(kernel, signature, constants)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": 8}).asm

for arch in (75, 120):
    sizes = dict(ADMIT=True, CHOICES=8, EXPERTS=128, COLUMNS=4096, ROWS=2)
    asm = compiled(resolve_kernel, sizes, arch)
    assert asm["cubin"]
    assert asm["ttir"].count("barrier") == 2, "hits | sweep | changes: see the module"
    ptx = compiled(fetch_kernel, dict(BLOCK=BLOCK), arch)["ptx"]
    lines = ptx.splitlines()
    assert sum("ld.global" in line and "v4.b32" in line for line in lines) == BLOCK / 256 / 4
    assert sum("st.global" in line and "v4.b32" in line for line in lines) == BLOCK / 256 / 4
"""


def test_kernels_compile_for_gpus_old_and_new_with_loads_of_16_bytes(tmp_path: Any) -> None:
    """Down to machine code, for which no GPU is needed; in a process without the interpreter."""
    pytest.importorskip("triton")
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(script, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
