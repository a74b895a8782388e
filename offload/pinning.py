"""Knows how main memory is made readable for a device; not whose memory it is.

Pinned here means: the system may not move or swap these pages, copies from them run beside
everything else, and kernels read them over the link at the address `device_address` gives.
"""

import ctypes
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

_PORTABLE, _MAPPED = 1, 2  # for every context; readable by kernels


class Pinner(Protocol):
    """What an arena asks of a device. A refusal is normal: systems cap what may be pinned."""

    def register(self, address: int, nbytes: int) -> bool:
        """Pin these pages; False when the system refuses."""
        ...

    def unregister(self, address: int) -> None:
        """Let go what was registered at `address`."""
        ...

    def device_address(self, address: int) -> int:
        """Where the device sees memory that was registered at `address`."""
        ...


class CudaPinner:
    """Pins for a CUDA device, through the driver.

    Not through the runtime (`torch.cuda.cudart().cudaHostRegister`): a refusal there stays behind
    as the runtime's last error, and the next kernel launch would report it as its own.
    `refusal` keeps what the driver last said no with, for messages.
    """

    def __init__(self, device: "torch.device | str") -> None:
        self._device = device
        self._driver = load_driver()
        self.refusal: str | None = None

    def register(self, address: int, nbytes: int) -> bool:
        self._make_current()
        code = self._driver.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE | _MAPPED)
        )
        if code:
            self.refusal = self._name_of(code)
        return code == 0

    def unregister(self, address: int) -> None:
        self._make_current()
        code = self._driver.cuMemHostUnregister(ctypes.c_void_p(address))
        assert code == 0, f"cannot unpin memory: {self._name_of(code)}"

    def device_address(self, address: int) -> int:
        self._make_current()
        found = ctypes.c_uint64(0)
        code = self._driver.cuMemHostGetDevicePointer_v2(
            ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)
        )
        assert code == 0, f"pinned memory is out of the device's sight: {self._name_of(code)}"
        return found.value

    def _make_current(self) -> None:
        """The driver works in the calling thread's context; any runtime call binds torch's."""
        import torch

        torch.cuda.synchronize(self._device)

    def _name_of(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._driver.cuGetErrorName(ctypes.c_int(code), ctypes.byref(name))
        return name.value.decode() if name.value else f"error {code}"


def load_driver() -> ctypes.CDLL:
    """CUDA's driver library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class SimulatedPinner:
    """The simulated device's: it sees memory where it is, and takes at most `limit_nbytes`."""

    def __init__(self, limit_nbytes: int | None = None) -> None:
        self._limit_nbytes = limit_nbytes
        self.pieces: dict[int, int] = {}  # address -> bytes registered there

    def register(self, address: int, nbytes: int) -> bool:
        for start, length in self.pieces.items():
            apart = address + nbytes <= start or start + length <= address
            assert apart, "memory pinned twice"
        pinned = sum(self.pieces.values())
        if self._limit_nbytes is not None and pinned + nbytes > self._limit_nbytes:
            return False
        self.pieces[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        del self.pieces[address]

    def device_address(self, address: int) -> int:
        assert address in self.pieces, "this memory is not pinned"
        return address
