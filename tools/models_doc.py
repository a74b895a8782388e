"""Makes docs/models.md of the registry that the tests of families are parametrized by.

PYTHONPATH=. python tools/models_doc.py > docs/models.md
"""

from moecli.models.config import ModelSpec
from tests.models.families import BORDER, FAMILIES, LENGTH, Family

HEAD = f"""# Families

Made by tools/models_doc.py of the registry that the tests are parametrized by
(tests/models/families.py). A family is here when all of this is checked of it, on tiny random
models against transformers itself:

- Logits of a prompt and of single tokens, to 1e-5 in fp32: {LENGTH} tokens at once, one by one, and
  in pieces, across the borders of chunks and windows of {BORDER}; for each variant below.
- Three sequences of different lengths in one forward pass; greedy answers equal token by token.
- Tensor names, fused experts and unfused, under every prefix that checkpoints use.
- The whole way: saved by transformers, `moecli quantize`, `moecli run`, against transformers with
  the same weights, dequantized.
- Parameters of the released models below at their full size, exactly.

| family | released: parameters, active | few tokens | graphics card | transformers reads it |
|---|---|---|---|---|
"""
TAIL = """
Steps of few tokens (decode) are compiled calls on the processor, or plain PyTorch around compiled
products. Where the graphics card is "refused", a run there ends with the reason, and `--device cpu`
computes it. The column is tested on a simulated device in place of a card: docs/gpu.md.
"""


def document() -> str:
    rows = "".join(_row(name, family) for name, family in FAMILIES.items())
    variants = "".join(map(_variants, FAMILIES.values()))
    return f"{HEAD}{rows}{TAIL}\n## Variants\n\n{variants}"


def _row(name: str, family: Family) -> str:
    released = "; ".join(
        f"{model}: {_billions(spec.num_params)}, {_billions(spec.num_active_params)}"
        for model, spec in (
            (model, ModelSpec.from_hf(config)) for model, config in family.released.items()
        )
    )
    few = "compiled" if family.compiled else "plain"
    card = "yes" if family.on_a_card else "refused"
    reads = "yes" if family.library_reads else "no: docs/file-format.md"
    return f"| `{name}` | {released} | {few} | {card} | {reads} |\n"


def _variants(family: Family) -> str:
    words = ", ".join(name.replace("_", " ") for name in family.variants)
    notes = "".join(f"; {note}" for note in family.notes)
    return f"- `{family.model_type}`: {words}{notes}\n"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B"


if __name__ == "__main__":
    print(document(), end="")
