"""Knows what a conversion writes for a model of the library."""

import re
from collections.abc import Iterable

from moecli.models.facts import LibraryFacts
from moecli.models.hf.library import build
from moecli.models.hf.probing import Names, Shapes, expert_items
from moecli.models.hf.spec import HfSpec
from moecli.models.naming import Conversion
from quant.items import DenseItem, TensorSlice
from quant.scheme import QuantScheme


def plan_library_conversion(
    spec: LibraryFacts, shapes: Shapes, dense_scheme: QuantScheme | None = None
) -> Conversion:
    """What to write for a source checkpoint with tensors of these shapes.

    Experts get the names of the library's modules; all else keeps those of the source. Plain
    linears of the text decoder take `dense_scheme` where the library takes them as they are;
    routers, embeddings and what it joins of several tensors keep their 16 bits, vectors their
    fp32. Raises MoecliError for a missing tensor or a wrong shape.
    """
    assert isinstance(spec, HfSpec), f"{spec.architecture} is no model of the library"
    names = Names(build(spec.config), shapes)
    experts = expert_items(names, shapes, spec.modules)
    targets = {name for module in spec.modules for name in module.parameters}
    linears = {tensor.name for tensor in spec.dense_tensors if tensor.linear}
    dense = []
    for name, renamed in names.renamed.items():
        if renamed.target in targets:
            continue
        source = TensorSlice(name)
        plain = renamed.pattern is None and renamed.target in linears
        if dense_scheme is not None and plain and name.endswith(".weight"):
            dense.append(DenseItem(name.removesuffix(".weight"), source, dense_scheme))
        else:
            vector = len(shapes[name]) <= 1  # corrections of routers, decays of states
            dense.append(DenseItem(name, source, None, exact=vector))
    return Conversion(tuple(experts), tuple(dense), _ignored(dense))


def _ignored(dense: Iterable[DenseItem]) -> tuple[str, ...]:
    """Patterns of all modules that stay in 16 bits, one for those of all layers."""
    kept = [item.name for item in dense if item.scheme is None and item.name.endswith(".weight")]
    modules = [re.escape(name.removesuffix(".weight")) for name in kept]
    return tuple(sorted({"re:" + re.sub(r"\d+", r"\\d+", name) + "$" for name in modules}))
