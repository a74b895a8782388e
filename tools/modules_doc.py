"""Makes docs/modules.md of what the first lines of all modules say; a test holds it current.

python tools/modules_doc.py > docs/modules.md
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant", "offload", "moecli")
HEAD = """# Every module

The first line of a module says what it knows, and often what it does not know. This page has them
all, made by tools/modules_doc.py; docs/structures.md says how they work together.
"""


def sources(folder: Path) -> list[Path]:
    """Modules of a folder itself, and C++ files that are no mere implementation of a header."""
    headers = set(folder.glob("*.h"))
    own = {path for path in folder.glob("*.cpp") if path.with_suffix(".h") not in headers}
    return [*sorted(folder.glob("*.py")), *sorted(headers | own)]


def first_words(path: Path) -> str:
    """The first paragraph of a module's docstring, or of a C++ file's comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = text.splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
        found = "\n".join(line.removeprefix("//").strip() for line in lines[:end])
    return " ".join(found.split("\n\n")[0].split())


def document() -> str:
    parts = [HEAD]
    for package in PACKAGES:
        folders = [ROOT / package, *sorted(p for p in (ROOT / package).rglob("*") if p.is_dir())]
        for folder in folders:
            rows = [(p.name, first_words(p)) for p in sources(folder)]
            if rows:
                about = [words for name, words in rows if name == "__init__.py"]
                parts.append(f"\n## {folder.relative_to(ROOT)}\n")
                parts += [f"\n{words}\n" for words in about if words]
                parts.append("\n")
                parts += [f"- `{name}`: {words}\n" for name, words in rows if name != "__init__.py"]
    return "".join(parts)


if __name__ == "__main__":
    print(document(), end="")
