"""The arena: exact, aligned, given back."""

import ctypes
import subprocess
import sys

import pytest

from offload.errors import OffloadError
from offload.host import HostArena
from tests.offload.offload_files import PAGE, bytes_at


def test_slots_are_aligned_disjoint_and_reached_by_buffer_and_address() -> None:
    arena = HostArena(3 * 2 * PAGE + PAGE, 2 * PAGE)
    assert (arena.num_slots, arena.nbytes) == (3, 6 * PAGE)
    for slot in range(3):
        with arena.buffer(slot) as buffer:
            assert len(buffer) == 2 * PAGE
            buffer[:] = bytes([slot + 1]) * len(buffer)
    for slot in range(3):
        assert arena.address(slot) % PAGE == 0
        assert bytes_at(arena.address(slot), 2 * PAGE) == bytes([slot + 1]) * (2 * PAGE)
    ctypes.memset(arena.address(1), 9, 5)
    with arena.buffer(1) as buffer:
        assert bytes(buffer[:6]) == bytes([9] * 5 + [2])
    arena.close()
    arena.close()


def test_a_closed_arena_gives_no_addresses() -> None:
    arena = HostArena(PAGE, PAGE)
    arena.close()
    with pytest.raises(AssertionError, match="closed"):
        arena.address(0)
    with pytest.raises(AssertionError, match="closed"):
        arena.buffer(0)


def test_bad_sizes_are_bugs() -> None:
    with pytest.raises(AssertionError, match="hold no slot"):
        HostArena(PAGE - 1, PAGE)
    with pytest.raises(AssertionError, match="no multiple of 4096"):
        HostArena(10 * PAGE, PAGE + 1)
    arena = HostArena(PAGE, PAGE)
    for slot in (-1, 1):
        with pytest.raises(AssertionError, match="no slot"):
            arena.address(slot)
    arena.close()


@pytest.mark.parametrize("nbytes", [1 << 60, 1 << 70])
def test_refused_memory_is_told(nbytes: int) -> None:
    with pytest.raises(OffloadError, match=r"refuses .* GiB of memory for experts") as caught:
        HostArena(nbytes, PAGE)
    assert "--ram" in (caught.value.hint or "")


CHILD = """
import os, random, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from tests.offload.offload_files import ModelFiles

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

files = ModelFiles(Path(sys.argv[1]), layers=2, experts=16, nbytes=1 << 20)
files.blobs.clear()
manager = files.manager(8)
base = rss()
peak = 0
draw = random.Random(3)
for _ in range(150):
    layer = draw.randrange(2)
    for wave in manager.waves(layer, draw.sample(range(16), draw.choice((2, 8, 16)))):
        with manager.ensure(layer, wave):
            manager.prefetch(1 - layer, draw.sample(range(16), 3))
            peak = max(peak, rss())
manager.drain_prefetch()
print(peak - base)
manager.close()
print(rss() - base)
"""


def test_memory_stays_within_the_arena_and_comes_back(tmp_path: object) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), *sys.path],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, after = map(int, result.stdout.split())
    slack = 3 << 20  # thread stacks and the like
    assert 7 << 20 < peak < (8 << 20) + slack  # 32 MiB went through 8 MiB of slots
    assert after < slack
