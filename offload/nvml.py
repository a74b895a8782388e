"""Knows what NVIDIA's management library tells without taking memory of the graphics card.

Asking CUDA itself would first create a context there. Where the library is missing, or refuses,
everything is None.
"""

import ctypes
from typing import Any

_TEXT_NBYTES = 96


class _Memory(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("total", "free", "used"))


def open_library() -> Any | None:
    """The library, ready to be asked."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def driver_version(library: Any) -> str | None:
    text = ctypes.create_string_buffer(_TEXT_NBYTES)
    if library.nvmlSystemGetDriverVersion(text, _TEXT_NBYTES) != 0:
        return None
    return text.value.decode("ascii", "replace")


def free_nbytes(library: Any, uuid: str) -> int | None:
    """VRAM that nobody uses; `uuid` as CUDA tells it, without a prefix."""
    device = ctypes.c_void_p()
    memory = _Memory()
    if library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(device)) != 0:
        return None
    if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
        return None
    return int(memory.free)
