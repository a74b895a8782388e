"""Compiles Triton kernels for GPUs that are not here: a launch compiles what it would have run.

Works where Triton's interpreter is off; `run_python` starts such a Python.
"""

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Programs(dict[str, str]):
    """Kernel name -> PTX of its last launch. `spilled`: bytes of registers kept in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.spilled: dict[str, int] = {}


@contextlib.contextmanager
def compiling(capability: int, multiprocessors: int = 128) -> Iterator[Programs]:
    """What launches in here are compiled to; the tensors stay as they are.

    `capability` is 86 for sm_86. The machine code is made too, so that what the assembler of the
    GPU would refuse fails here. So does asking the device anything between launches.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant.kernels.triton import card

    found = Programs()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args, strict=False)) | {
            n: kwargs.pop(n) for n in names if n in kwargs
        }
        assert len(given) == len(names), f"`{kernel.__name__}` lacks arguments"
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            signature[parameter.name] = (
                _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            )
            if number % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=kwargs).asm
        found[kernel.__name__] = compiled["ptx"]
        found.spilled[kernel.__name__] = _spilled(compiled["cubin"])

    with (
        patch.object(triton.JITFunction, "run", run),
        patch.object(card, "_INTERPRETED", card.Card(capability, multiprocessors)),
        _NeverAsk(),
    ):
        yield found


def _spilled(machine_code: bytes) -> int:
    """Bytes of its own memory that a thread needs, for what its registers do not hold."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = (knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", said)
    return int(stack)


class _NeverAsk(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"`{name}` waits"
        return func(*args, **(kwargs or {}))


def run_python(function: Callable[[], Any], cache: Path, *, interpret: bool) -> Any:
    """What the function of a test module returns, as JSON, in a Python of its own."""
    code = (
        f"import json, runpy; module = runpy.run_path({inspect.getfile(function)!r}); "
        f"print(json.dumps(module[{function.__name__!r}]()))"
    )
    environment = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])
