"""Knows how CUDA's copy engine is asked for runs of bytes at equal distances."""

import ctypes
from typing import TYPE_CHECKING

from offload.pinning import load_driver

if TYPE_CHECKING:
    import torch

_HOST, _DEVICE = 1, 2  # kinds of memory


class _Side(ctypes.Structure):
    """One half of the driver's CUDA_MEMCPY2D: where a copy comes from, or goes to."""

    _fields_ = (
        ("x_nbytes", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
    )


class _Copy(ctypes.Structure):
    _fields_ = (
        ("source", _Side),
        ("target", _Side),
        ("width_nbytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class CopyRuns:
    """Copies uint8 [runs, n] in pinned memory to uint8 [runs, n] on the device, on a stream.

    Not through torch: where rows lie apart, its `copy_` first packs them into a temporary on the
    host, which is pageable, and then waits for the copy.
    """

    def __init__(self) -> None:
        self._driver: ctypes.CDLL | None = None

    def __call__(
        self, target: "torch.Tensor", source: "torch.Tensor", stream: "torch.cuda.Stream"
    ) -> None:
        runs, nbytes = source.shape
        assert target.shape == source.shape, f"{tuple(source.shape)} to {tuple(target.shape)}"
        assert source.stride(1) == target.stride(1) == 1, "the bytes of a run lie apart"
        if self._driver is None:
            self._driver = load_driver()
        stream.query()  # binds torch's context to this thread: the driver works in that
        copy = _Copy(
            _Side(kind=_HOST, host=source.data_ptr(), pitch=source.stride(0)),
            _Side(kind=_DEVICE, device=target.data_ptr(), pitch=target.stride(0)),
            nbytes,
            runs,
        )
        code = self._driver.cuMemcpy2DAsync_v2(
            ctypes.byref(copy), ctypes.c_void_p(stream.cuda_stream)
        )
        assert code == 0, f"a copy of {runs} runs of {nbytes} bytes failed: error {code}"
