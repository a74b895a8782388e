"""Runs llama.cpp through llama-cpp-python's low-level functions, when it is told to.

    PEER_PYTHON -m benchmarks.llama.peer_worker

Decodes and reads prompts as llama-bench does: random tokens, no sampling, logits of the last
token.
"""

import random
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from benchmarks.llama.gguf_model import sizes, write_gguf
from benchmarks.llama.serving import serve

_FTYPES = {
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
}


class Peer:
    """One open model at a time."""

    def __init__(self) -> None:
        llama.llama_backend_init()
        self._model: Any = None
        self._context: Any = None
        self._random = random.Random(0)

    def version(self) -> dict[str, Any]:
        return {
            "llama_cpp_python": llama.__version__,
            "system_info": llama.llama_print_system_info().decode(),
        }

    def write(self, arch: str, config: dict[str, Any], path: str) -> None:
        write_gguf(arch, config, Path(path))

    def quantize(self, source: str, out: str, kind: str, pure: bool, threads: int) -> None:
        """`pure`: every matrix in this type, where llama-quantize would give some more bits."""
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.pure = _FTYPES[kind], threads, pure
        code = llama.llama_model_quantize(source.encode(), out.encode(), params)
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code}")

    def sizes(self, path: str, experts_used: int) -> dict[str, Any]:
        return sizes(Path(path), experts_used)

    def open(self, path: str, repack: bool, threads: int, ctx: int) -> None:
        assert self._model is None, "a process opens one model"
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        options = llama.llama_context_default_params()
        options.n_ctx = ctx
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a fresh prompt."""
        prompt = self._tokens(tokens)
        self._clear()
        begin = time.perf_counter()
        self._decode(prompt)
        return tokens / (time.perf_counter() - begin)

    def decode(self, tokens: int) -> float:
        """Tokens a second, one after the other, behind a prompt of one."""
        self._clear()
        self._decode(self._tokens(1))
        steps = [[token] for token in self._tokens(tokens)]
        begin = time.perf_counter()
        for step in steps:
            self._decode(step)
        return tokens / (time.perf_counter() - begin)

    def logits(self, tokens: list[int]) -> list[float]:
        """Those after a prompt."""
        self._clear()
        self._decode(tokens)
        found = llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._vocab_size,)).tolist()

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int]) -> None:
        array = (llama.llama_token * len(tokens))(*tokens)
        code = llama.llama_decode(self._context, llama.llama_batch_get_one(array, len(tokens)))
        llama.llama_synchronize(self._context)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


if __name__ == "__main__":
    peer = Peer()
    names = ("version", "write", "quantize", "sizes", "open", "prefill", "decode", "logits")
    serve({name: getattr(peer, name) for name in names})
