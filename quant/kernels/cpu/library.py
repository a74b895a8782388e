"""Knows where the compiled kernels are and how they are called; not what they compute.

MOECLI_CPU_ISA names the instruction set to use, where the fastest is not wanted. MOECLI_CPU_LIBRARY
names another library than the one beside this file: how a build with checks is tested.
"""

import ctypes
import functools
import os
from pathlib import Path

from quant.errors import QuantError
from quant.kernels.cpu.build import LIBRARY

_ABI = 8  # of src/api.cpp
BUILD_HINT = (
    "install a C++ compiler (g++ or clang++) and run `python -m quant.kernels.cpu.build`, "
    "or use `--kernels torch`"
)


class NoLibrary(QuantError):
    """The kernels are not compiled, or cannot be loaded: plain torch can stand in for them."""


class MatrixArgument(ctypes.Structure):
    """`Matrix` of src/types.h."""

    _fields_ = (
        *(("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        *(("packed_stride", ctypes.c_int64), ("scale_stride", ctypes.c_int64)),
        *(("in_features", ctypes.c_int64), ("bits", ctypes.c_int), ("group", ctypes.c_int)),
    )


class LinearArgument(ctypes.Structure):
    """`Linear` of src/linear.h."""

    _fields_ = (("weight", MatrixArgument), ("rows", ctypes.c_int64), ("out", ctypes.c_void_p))


class MoeArgument(ctypes.Structure):
    """`MoeCall` of src/moe.h."""

    _fields_ = (
        *(("hidden", ctypes.c_void_p), ("ids", ctypes.c_void_p)),
        *(("weights", ctypes.c_void_p), ("addresses", ctypes.c_void_p)),
        *(("tokens", ctypes.c_int64), ("choices", ctypes.c_int64), ("experts", ctypes.c_int64)),
        *(("hidden_size", ctypes.c_int64), ("intermediate", ctypes.c_int64)),
        *(("begin", ctypes.c_int64), ("end", ctypes.c_int64)),
        *(("bits", ctypes.c_int), ("group", ctypes.c_int)),
        *(("activation", ctypes.c_int), ("weight_on_input", ctypes.c_bool)),
        *(("contributions", ctypes.c_void_p), ("sums", ctypes.c_void_p)),
        ("biases", ctypes.c_void_p),
    )


class SearchArgument(ctypes.Structure):
    """`ScaleSearch` of src/types.h."""

    _fields_ = (
        *(("weight", ctypes.c_void_p), ("type", ctypes.c_int), ("rows", ctypes.c_int64)),
        *(("row_groups", ctypes.c_int64), ("bits", ctypes.c_int), ("group", ctypes.c_int)),
        *(("factors", ctypes.c_void_p), ("count", ctypes.c_int)),
        *(("first_step", ctypes.c_int), ("end_step", ctypes.c_int)),
        *(("packed", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        *(("row_errors", ctypes.c_void_p), ("row_squares", ctypes.c_void_p)),
    )


class Library:
    """The loaded library, with the kernels of one instruction set."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        """Raises QuantError where it cannot be loaded, or has no kernels `isa` for this machine."""
        self.path = path
        self._dll = _load(path)
        self.isa = self._choose(isa)
        self._kernels = ctypes.c_void_p(self._dll.moecli_kernels(self.isa.encode()))
        assert self._kernels.value, f"no kernels {self.isa}"

    def _choose(self, asked: str | None) -> str:
        able = self.isas
        if not asked:
            return able[0]
        if asked not in able:
            raise QuantError(
                f"MOECLI_CPU_ISA is `{asked}`, which this processor or this build does not have",
                f"use one of {', '.join(able)}, or unset it",
            )
        return asked

    @functools.cached_property
    def isas(self) -> tuple[str, ...]:
        """What this processor can run, fastest first."""
        names: list[str] = []
        while name := self._dll.moecli_isa(len(names)):
            names.append(name.decode())
        return tuple(names)

    def routed_experts(self, call: MoeArgument, threads: int) -> bool:
        """False where a choice is no expert; then nothing was computed."""
        code = self._dll.moecli_routed_experts(self._kernels, ctypes.byref(call), threads)
        return _checked(code) != _NO_EXPERT

    def sum_contributions(self, *arguments: int) -> None:
        _checked(self._dll.moecli_sum_contributions(self._kernels, *arguments))

    def linears(self, x: int, tokens: int, all_: list[LinearArgument], threads: int) -> None:
        array = (LinearArgument * len(all_))(*all_)
        _checked(self._dll.moecli_linears(self._kernels, x, tokens, array, len(all_), threads))

    def linear_float(self, *arguments: int) -> None:
        _checked(self._dll.moecli_linear_float(self._kernels, *arguments))

    def search_scales(self, search: SearchArgument, threads: int) -> bool:
        """False where a weight is not finite, or too large."""
        code = self._dll.moecli_search_scales(self._kernels, ctypes.byref(search), threads)
        return _checked(code) != _NOT_FINITE

    def step(
        self, decoder: object, step: object, first: int, delta: int | None, threads: int
    ) -> int:
        """The layer that somebody else must finish, or how many there are.

        `decoder` and `step`: references (`ctypes.byref`) to arguments of quant.kernels.cpu.few.
        """
        at = ctypes.c_int64(first)
        code = self._dll.moecli_step(self._kernels, decoder, step, ctypes.byref(at), delta, threads)
        _checked(code)
        return at.value

    def mlp(self, call: object, x: int, tokens: int, out: int, threads: int) -> None:
        """`call`: a reference to a MlpArgument."""
        _checked(self._dll.moecli_mlp(self._kernels, call, x, tokens, out, threads))


_NO_EXPERT = _NOT_FINITE = 2


def _checked(code: int) -> int:
    if code == 1:
        raise MemoryError("the kernels for the processor found no memory to work in")
    return code


@functools.cache
def library() -> Library:
    """The library of this installation. Raises QuantError where there is none, with a hint."""
    other = os.environ.get("MOECLI_CPU_LIBRARY")
    return Library(Path(other) if other else LIBRARY, os.environ.get("MOECLI_CPU_ISA"))


def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise NoLibrary("the kernels for the processor are not compiled", BUILD_HINT)
    try:
        dll = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibrary(
            f"the kernels for the processor cannot be loaded: {error}", BUILD_HINT
        ) from error
    if not hasattr(dll, "moecli_abi") or dll.moecli_abi() != _ABI:
        raise NoLibrary("the kernels for the processor are of another version", BUILD_HINT)
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    dll.moecli_isa.restype, dll.moecli_isa.argtypes = ctypes.c_char_p, (integer,)
    dll.moecli_kernels.restype, dll.moecli_kernels.argtypes = pointer, (ctypes.c_char_p,)
    dll.moecli_routed_experts.argtypes = (pointer, ctypes.POINTER(MoeArgument), integer)
    dll.moecli_sum_contributions.argtypes = (
        *(pointer, pointer, pointer, number, number, number, pointer, integer),
    )
    dll.moecli_linears.argtypes = (
        *(pointer, pointer, number, ctypes.POINTER(LinearArgument), integer, integer),
    )
    dll.moecli_linear_float.argtypes = (
        *(pointer, pointer, number, pointer, integer, number, number, pointer, integer),
    )
    dll.moecli_search_scales.argtypes = (pointer, ctypes.POINTER(SearchArgument), integer)
    dll.moecli_step.argtypes = (pointer, pointer, pointer, pointer, pointer, integer)
    dll.moecli_mlp.argtypes = (pointer, pointer, pointer, number, pointer, integer)
    return dll
