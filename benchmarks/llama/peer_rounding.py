"""Rounds weights to llama.cpp's types with llama.cpp's own code, when it is told to.

PEER_PYTHON -m benchmarks.llama.peer_rounding
"""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from benchmarks.llama.serving import serve


def round_(folder: str, kind: str) -> float:
    """weight.npy [O, I] fp32 -> rounded.npy; the bits a weight of `kind`."""
    weight = np.ascontiguousarray(np.load(Path(folder) / "weight.npy"))
    quant = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[quant]
    packed = np.empty((weight.shape[0], weight.shape[1] // block * nbytes), np.uint8)
    function = _ggml().ggml_quantize_chunk
    function.restype, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    size = function(quant, weight.ctypes.data, packed.ctypes.data, 0, *weight.shape, None)
    assert size == packed.nbytes, f"{size} bytes instead of {packed.nbytes}"
    np.save(Path(folder) / "rounded.npy", gguf.quants.dequantize(packed, quant))
    return 8 * nbytes / block


def _ggml() -> ctypes.CDLL:
    return ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))


if __name__ == "__main__":
    serve({"round": round_})
