"""What is found out about a graphics card, by a torch and a driver library of the test's own."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import hardware, nvml
from offload.hardware import detect

MIB = 1 << 20


class FakeCard:
    """A card of 24000 MiB; the first question to CUDA takes `context`, others have `used`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, context: int, used: int) -> None:
        self.free = (24_000 - used) * MIB
        self.context = context * MIB
        self.library: Any = FakeLibrary(self)
        self.uuid = "1234"
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "current_device", lambda: 0)
        properties = SimpleNamespace(name="RTX", uuid=self.uuid)
        monkeypatch.setattr(cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(cuda, "mem_get_info", self._mem_get_info)
        monkeypatch.setattr(ctypes, "CDLL", self._open)
        monkeypatch.setattr(hardware, "_contexts", [])

    def _mem_get_info(self) -> tuple[int, int]:
        self.free, self.context = self.free - self.context, 0
        return self.free, 24_000 * MIB

    def _open(self, name: str) -> Any:
        assert name == "libnvidia-ml.so.1"
        if self.library is None:
            raise OSError
        return self.library


class FakeLibrary:
    def __init__(self, card: FakeCard) -> None:
        self._card = card
        self.refuses: set[str] = set()

    def nvmlInit_v2(self) -> int:
        return int("init" in self.refuses)

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        assert length == len(text)
        text.value = b"600.12"
        return int("driver" in self.refuses)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        return 0 if uuid == f"GPU-{self._card.uuid}".encode() else 7

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        memory._obj.free = self._card.free
        return int("memory" in self.refuses)


def test_the_context_is_measured_and_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCard(monkeypatch, context=400, used=2000)
    for _ in range(2):  # the second time the context is there
        machine = detect(gpu=True)
        assert (machine.gpu_name, machine.gpu_driver) == ("RTX", "600.12")
        assert machine.vram_total == 24_000 * MIB
        assert machine.vram_free == 22_000 * MIB, "what others leave"
        assert machine.context_nbytes == 400 * MIB + hardware._LIBRARIES_NBYTES


@pytest.mark.parametrize("refused", ["init", "memory"])
def test_without_the_driver_library_the_context_is_unknown(
    monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    card = FakeCard(monkeypatch, context=400, used=2000)
    card.library.refuses = {refused}
    machine = detect(gpu=True)
    assert (machine.vram_free, machine.context_nbytes) == (21_600 * MIB, None)


def test_without_any_library(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCard(monkeypatch, context=400, used=2000).library = None
    machine = detect(gpu=True)
    assert (machine.gpu_name, machine.gpu_driver) == ("RTX", None)
    assert (machine.vram_free, machine.context_nbytes) == (21_600 * MIB, None)
    assert nvml.open_library() is None


@pytest.mark.parametrize("context", [0, 5000])
def test_a_difference_that_is_no_context_is_not_taken_for_one(
    monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    FakeCard(monkeypatch, context=context, used=2000)
    machine = detect(gpu=True)
    assert (machine.vram_free, machine.context_nbytes) == ((22_000 - context) * MIB, None)


def test_a_driver_that_does_not_say_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCard(monkeypatch, context=400, used=0).library.refuses = {"driver"}
    assert detect(gpu=True).gpu_driver is None


def test_no_card() -> None:
    machine = detect(gpu=True)
    assert (machine.gpu_name, machine.vram_total, machine.vram_free) == (None, None, None)
