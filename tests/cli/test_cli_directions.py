"""Which module may import which, read from the syntax tree of every file."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("moecli", "quant", "offload")
STDLIB_ONLY = (
    *("offload.policy", "offload.footprint", "offload.lanes", "offload.placing", "offload.plan"),
    *("offload.trace", "moecli.models.config"),
)
LAZY = {"transformers", "bitsandbytes", "accelerate", "huggingface_hub"}
LIBRARY = "moecli.models.hf."  # made of transformers, and imported inside functions alone
HUB = ("moecli.hub.client", "moecli.models.hf.library")  # the library raises the hub's errors


def modules() -> dict[str, str]:
    """Module name -> source."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {
        name.removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for name, path in zip(names, files, strict=True)
    }


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(module, whether at the top level) of every import, those for type checkers too."""
    tree = ast.parse(source)
    for node, top in _statements(tree, top=True):
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def _statements(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, top
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _statements(child, top and not inside)


def faults(name: str, source: str) -> list[str]:
    """What `name` imports and may not."""
    package = name.partition(".")[0]
    found = []
    for target, top in imports(source):
        root = target.partition(".")[0]
        wrong = (
            (package == "quant" and root in ("offload", "moecli"))
            or (package == "offload" and root in ("quant", "moecli"))
            or (f"{name}.".startswith("moecli.models.") and root == "offload")
            or (root == "rich" and name != "moecli.ui")
            or (root in LAZY and top and not name.startswith(LIBRARY))
            or (target.startswith(LIBRARY) and top and not name.startswith(LIBRARY))
            or (root == "huggingface_hub" and name not in HUB)
            or root == "click"
            or (name in STDLIB_ONLY and root not in (package, *sys.stdlib_module_names))
        )
        if wrong:
            found.append(f"{name} imports {target}")
    return found


def test_directions_of_imports() -> None:
    sources = modules()
    assert {name.partition(".")[0] for name in sources} == set(PACKAGES)
    assert [fault for name, source in sources.items() for fault in faults(name, source)] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("quant.ops", "from offload.plan import MemoryPlan"),
        ("quant.ops", "def f():\n    import moecli.errors"),
        ("moecli.engine", "from moecli.models.hf.model import LibraryModel"),
        ("quant.ops", "if TYPE_CHECKING:\n    from offload import plan"),
        ("offload.disk", "import quant"),
        ("moecli.models.decoder", "from offload import manager"),
        ("moecli.chat", "def f():\n    from rich.console import Console"),
        ("moecli.engine", "import transformers"),
        ("moecli.engine", "try:\n    from transformers import AutoConfig\nexcept ImportError: ..."),
        ("moecli.cli", "import click"),
        ("moecli.hub.fetch", "def f():\n    from huggingface_hub import HfApi"),
        ("offload.policy", "import torch"),
    ],
)
def test_each_wrong_direction_is_seen(name: str, source: str) -> None:
    assert len(faults(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("moecli.ui", "from rich.text import Text"),
        ("moecli.engine", "def f():\n    import transformers"),
        ("moecli.models.decoder", "from quant import ops\nimport torch"),
        ("offload.plan", "import json\nfrom offload.errors import OffloadError"),
    ],
)
def test_right_directions_are_let_through(name: str, source: str) -> None:
    assert faults(name, source) == []


def test_files_stay_small() -> None:
    assert [name for name, source in modules().items() if source.count("\n") >= 500] == []
