"""Knows how to write small model files for the tests of this package, and what they hold."""

import ctypes
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from offload.disk import DiskTier, ExpertSpan
from offload.errors import OffloadError
from offload.host import HostArena
from offload.keys import ExpertKey
from offload.manager import ExpertManager
from offload.policy import LruPolicy, PolicyFactory
from offload.slots import DeviceSlots
from offload.trace import Trace

PAGE = 4096


class ModelFiles:
    """Experts of random bytes in one file a layer, each at a 4096-byte boundary."""

    def __init__(self, folder: Path, layers: int = 3, experts: int = 6, nbytes: int = 5000) -> None:
        self.layers, self.experts, self.nbytes = layers, experts, nbytes
        self.slot_nbytes = -(-nbytes // PAGE) * PAGE
        self.blobs: dict[ExpertKey, bytes] = {}
        self.spans: dict[ExpertKey, ExpertSpan] = {}
        generator = random.Random(7)
        for layer in range(layers):
            path = folder / f"layer{layer}.bin"
            content = bytearray(PAGE)  # as if a header were there
            for expert in range(experts):
                blob = generator.randbytes(nbytes)
                self.blobs[layer, expert] = blob
                self.spans[layer, expert] = ExpertSpan(path, len(content), nbytes)
                content += blob + bytes(self.slot_nbytes - nbytes)
            path.write_bytes(content)

    def path(self, layer: int) -> Path:
        return self.spans[layer, 0].path

    def disk(self, drop_cache: bool = False) -> DiskTier:
        return DiskTier(self.spans, drop_cache)

    def gated_disk(self, *keys: ExpertKey) -> "GatedDisk":
        return GatedDisk(self.spans, keys)

    def manager(
        self,
        slots: int,
        *,
        device: DeviceSlots | None = None,
        num_workers: int = 2,
        keep: bool = True,
        trace: Trace | None = None,
        policy_factory: PolicyFactory = LruPolicy,
        disk: DiskTier | None = None,
    ) -> ExpertManager:
        arena = HostArena(slots * self.slot_nbytes, self.slot_nbytes)
        return ExpertManager(
            disk or self.disk(), arena, device, policy_factory, num_workers, keep, trace
        )


class GatedDisk(DiskTier):
    """Reads of the gated experts wait, `begun` set, until `open` or `fail`."""

    TIMEOUT_S = 20.0  # a test that would hang fails instead

    def __init__(self, spans: Mapping[ExpertKey, ExpertSpan], gated: Sequence[ExpertKey]) -> None:
        super().__init__(spans)
        self._gated = set(gated)
        self._gate = threading.Event()
        self._error: BaseException | None = None
        self.begun = threading.Event()
        self.reads: list[ExpertKey] = []
        self.threads: set[str] = set()

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        self.reads.append(key)
        self.threads.add(threading.current_thread().name)
        if key in self._gated:
            self.begun.set()
            assert self._gate.wait(self.TIMEOUT_S), "nobody opened the gate"
            if self._error is not None:
                raise self._error
        return super().read_into(key, buffer)

    def open(self) -> None:
        self._gate.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._gate.set()


class FlakyDisk(DiskTier):
    """The read after `fail_next` was set fails; counts those that do not."""

    fail_next = False
    num_read = 0

    def read_into(self, key: ExpertKey, buffer: memoryview) -> int:
        if self.fail_next:
            self.fail_next = False
            buffer[:16] = b"x" * 16  # what it then holds is undefined
            raise OffloadError("the disk is gone")
        nbytes = super().read_into(key, buffer)
        self.num_read += 1
        return nbytes


def bytes_at(address: int, nbytes: int) -> bytes:
    """What lies at an address of this process, as a kernel would read it."""
    return ctypes.string_at(address, nbytes)
