"""Knows which slice of which source tensor becomes what of a model; asks the library's converter.

transformers renames, stacks, joins and transposes what checkpoints hold, by rules of its own for
every family. Instead of repeating them, its rules are applied to small tensors whose numbers say
where they come from.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moecli.errors import MoecliError
from moecli.models.hf.library import ExpertsModule
from quant.items import ExpertItem, TensorSlice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
_INNER, _HIDDEN = 2, 3  # sizes of a probe, for those of an expert
_STRIDE = 1 << 24  # numbers a source may have in its probe


@dataclass(frozen=True)
class Renamed:
    """What the library calls a source tensor, and by which of its converting rules, if any."""

    target: str
    pattern: str | None


class Names:
    """The library's rules for one model, applied to the names of one checkpoint."""

    def __init__(self, model: "PreTrainedModel", names: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        rules = get_model_conversion_mapping(model)
        self._model = model
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {
            pattern: rule for rule in self._converters for pattern in rule.source_patterns
        }
        self._state = model.state_dict()
        ordered = sorted(names, key=dot_natural_key)  # as the library does: rules may count
        self.renamed = {name: self._rename(name) for name in ordered}
        self._sources: dict[str, list[str]] = {}
        for name, renamed in self.renamed.items():
            self._sources.setdefault(renamed.target, []).append(name)

    def _rename(self, name: str) -> Renamed:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._state
        )
        if target not in self._state and name in self._state:
            return Renamed(name, None)
        return Renamed(target, pattern)

    @property
    def targets(self) -> list[str]:
        """What the library calls the tensors; of several that one rule makes, the first."""
        return list(self._sources)

    def sources(self, target: str) -> list[str]:
        """The source tensors of one parameter, in the order in which they are joined."""
        return self._sources.get(target, [])

    def convert(self, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the library makes of tensors, by source name: parameters, `target` the first."""
        patterns = [self.renamed[name].pattern for name in tensors]
        if patterns[0] is None:
            (plain,) = tensors.values()
            return {target: plain}
        rule = deepcopy(self._by_pattern[patterns[0]])
        for (name, tensor), pattern in zip(tensors.items(), patterns, strict=True):
            rule.add_tensor(target, name, pattern, partial(_itself, tensor))
        made = rule.convert(target, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def expert_items(
    names: Names, shapes: Shapes, modules: Sequence[ExpertsModule]
) -> list[ExpertItem]:
    """Where gate, up and down of every expert lie in a source checkpoint, by layer and expert.

    Raises MoecliError where a tensor is missing, has another shape than config.json says, or is
    made into an expert by more than slicing, transposing and stacking.
    """
    items = []
    for module in modules:
        gate_up, down = (_Origin.of(names, shapes, module, name) for name in module.parameters)
        inner, hidden = module.intermediate_size, module.hidden_size
        for expert in range(module.num_experts):
            gate = gate_up.slice_of(expert, 0, inner)
            up = gate_up.slice_of(expert, inner, 2 * inner)
            prefix = f"{module.name}.{expert}"
            down_slice = down.slice_of(expert, 0, hidden)
            items.append(ExpertItem(module.layer, expert, prefix, gate, up, down_slice))
    return items


@dataclass(frozen=True)
class _Origin:
    """Where the matrices [E, out, in] of one parameter come from."""

    target: str
    sources: tuple[str, ...]
    out: int
    made: Tensor | None  # what the converter makes of probes; None: the source is the parameter
    probes: Mapping[str, Tensor]
    transposed: bool

    @classmethod
    def of(cls, names: Names, shapes: Shapes, module: ExpertsModule, target: str) -> "_Origin":
        sources = names.sources(target)
        if not sources:
            raise MoecliError(
                f"no tensor of the checkpoint becomes `{target}`",
                "the checkpoint is incomplete, or its config.json belongs to another",
            )
        up = target == module.parameters[0]
        out = 2 * module.intermediate_size if up else module.hidden_size
        inner = module.hidden_size if up else module.intermediate_size
        if names.renamed[sources[0]].pattern is None:
            expected = (module.num_experts, *((inner, out) if module.transposed else (out, inner)))
            _require(sources[0], shapes[sources[0]], expected)
            return cls(target, tuple(sources), out, None, {}, module.transposed)
        probes = _probes({name: shapes[name] for name in sources}, module)
        made = names.convert(target, probes)[target]
        rows = _probe_size(out, module)
        if module.transposed:
            made = made.transpose(1, 2)
        expected = (module.num_experts, rows, _probe_size(inner, module))
        assert tuple(made.shape) == expected, f"{target}: probes became {tuple(made.shape)}"
        return cls(target, tuple(sources), out, made, probes, False)

    def slice_of(self, expert: int, first: int, last: int) -> TensorSlice:
        """Rows first..last-1 of one expert, as a slice of one source tensor."""
        if self.made is None:
            rows = None if (first, last) == (0, self.out) else (first, last)
            return TensorSlice(self.sources[0], expert, self.transposed, rows)
        scale = self.made.shape[1]
        block = self.made[expert, first * scale // self.out : last * scale // self.out]
        source, position = divmod(int(block[0, 0]), _STRIDE)
        name = self.sources[source]
        probe = self.probes[name]
        index = None
        if probe.dim() == 3:
            index = position // probe[0].numel()
            probe = probe[index]
        for transposed in (False, True):
            matrix = probe.t() if transposed else probe
            starts = (matrix[:, 0] == block[0, 0]).nonzero()
            if len(starts) and matrix.shape[1] == block.shape[1]:
                begin = int(starts[0])
                end = begin + block.shape[0]
                if torch.equal(matrix[begin:end], block):
                    unit = (last - first) // block.shape[0]
                    whole = (begin, end) == (0, matrix.shape[0])
                    rows = None if whole else (begin * unit, end * unit)
                    return TensorSlice(name, index, transposed, rows)
        raise MoecliError(
            f"moecli cannot follow how `{self.target}` is made of the checkpoint's tensors",
            "convert the checkpoint with transformers' `save_pretrained` and quantize the result",
        )


def _probes(shapes: Shapes, module: ExpertsModule) -> dict[str, Tensor]:
    """A small tensor for each source, every number of which says where it stands in which."""
    probes = {}
    for index, (name, shape) in enumerate(shapes.items()):
        sizes = [_probe_size(size, module) for size in shape[-2:]]
        small = [*shape[:-2], *sizes]
        count = torch.Size(small).numel()
        assert len(shape) in (2, 3), f"an expert of {name} in {len(shape)} dimensions"
        assert count < _STRIDE, f"{name} has too many experts to probe"
        probes[name] = torch.arange(index * _STRIDE, index * _STRIDE + count).view(small)
    return probes


def _probe_size(size: int, module: ExpertsModule) -> int:
    """Equal sizes become equal, and what is twice an expert's inner size stays so."""
    inner, hidden = module.intermediate_size, module.hidden_size
    known = {2 * inner: 2 * _INNER, inner: _INNER}
    known.setdefault(2 * hidden, 2 * _HIDDEN)
    known.setdefault(hidden, _HIDDEN)
    if size not in known:
        raise MoecliError(
            f"a tensor of an expert has {size} rows or columns; config.json speaks of "
            f"{hidden} and {inner}",
            "the checkpoint and its config do not belong together; download both again",
        )
    return known[size]


def _require(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise MoecliError(
            f"tensor `{name}` has shape {list(shape)}; config.json makes it {list(expected)}",
            "the checkpoint and its config do not belong together; download both again",
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor
