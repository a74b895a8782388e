"""A stand-in for a CUDA graph where there is no GPU: what would not be captured is not replayed.

`capture` records the dispatcher's operations, `replay` runs them again on the same tensors and
writes what they give into the tensors that were given while recording. Python between them runs
once. As with a real graph

- capturing changes nothing: what operations wrote is put back, and their results are made NaN;
- an operation that waits for the device, or whose result's size depends on data, is refused;
- kernels launched behind the dispatcher's back are not replayed (and with CUDA would be).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_EMPTIES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_HOST_READS = {"tolist", "numpy", "cpu", "__array__", "pin_memory"}  # not all reach the dispatcher


class CaptureError(Exception):
    """The step does something that no graph can hold."""


@dataclass(frozen=True)
class _Call:
    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: dict[int, Tensor]  # by place among the outputs; only those with memory of their own


class SimulatedGraph:
    """See the module. `with graph.capture(): step()`, then `graph.replay()` as often as wanted."""

    def __init__(self) -> None:
        self._calls: list[_Call] | None = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        assert self._calls is None, "a graph is captured once"
        recorder = _Recorder()
        with torch.inference_mode():
            try:
                with _HostReads(), recorder:
                    yield
            finally:
                recorder.undo()
        self._calls = recorder.calls

    @torch.inference_mode()
    def replay(self) -> None:
        assert self._calls is not None, "nothing was captured"
        for call in self._calls:
            outputs = tree_leaves(call.operation(*call.args, **call.kwargs))
            for place, result in call.results.items():
                assert outputs[place].shape == result.shape, f"{call.operation}: another shape"
                result.copy_(outputs[place])


class _HostReads(TorchFunctionMode):
    """Refuses to hand numbers of tensors to Python."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _HOST_READS:
            raise CaptureError(f"`{func.__name__}` waits for the device")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Runs and records operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # what was written to, and what was there
        self._made: list[Tensor] = []

    def undo(self) -> None:
        """Put back what was written; make NaN what was made."""
        for written, before in reversed(self._before):
            written.copy_(before)
        for made in self._made:
            if made.is_floating_point():
                made.fill_(torch.nan)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operations: those are recorded
                return func.decompose(*args, **kwargs)
        _refuse(func, args)
        written = _written(func, args, kwargs)
        if written and not func._schema.returns:
            # An op of ours, which may also write where its tensors point to: that is not put back.
            self.calls.append(_Call(func, args, kwargs, {}))
            return None
        self._before += [(tensor, tensor.clone()) for tensor in written]
        outputs = func(*args, **kwargs)
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        results = {
            place: leaf
            for place, leaf in enumerate(tree_leaves(outputs))
            if isinstance(leaf, Tensor) and _memory(leaf) not in given
        }
        self._made += results.values()
        if func.overloadpacket.__name__ in _EMPTIES:
            for tensor in results.values():
                tensor.zero_()  # a skipped operation never fills them: let nothing odd stand there
        else:
            self.calls.append(_Call(func, args, kwargs, results))
        return outputs


def _refuse(func: Any, args: tuple[Any, ...]) -> None:
    name = func.name()
    if name.startswith("aten::index"):  # these have the tags because of masks alone
        leaves = tree_leaves(args[1:])
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in leaves):
            raise CaptureError(f"`{name}` with a mask waits for the device")
        return
    if name.startswith("aten::lift_fresh"):
        raise CaptureError("a tensor is made from Python numbers")
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    if any(tag in func.tags for tag in tags):
        raise CaptureError(f"`{name}` waits for the device")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the schema says are written to."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
