"""Makes docs/models.md of the registries that the tests of families are parametrized by.

PYTHONPATH=. python tools/models_doc.py > docs/models.md
"""

import textwrap

from moecli.models.config import ModelSpec
from tests.models.families import BORDER, FAMILIES, LENGTH, Family
from tests.models.library_families import FAMILIES as LIBRARY
from tests.models.library_families import RECURRENT

HEAD = f"""# Families

`moecli show MODEL` says whether a model runs through moecli's own decoder, or through transformers
with moecli's experts in it.

## Of moecli's own decoder

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

| family | released: parameters, active | few tokens | transformers reads it |
|---|---|---|---|
"""
TAIL = """
Steps of few tokens (decode) are compiled calls on the processor, or plain PyTorch around compiled
products. A graphics card takes all of these families. That is tested on a simulated device and in
Triton's interpreter, and has not been seen on a card yet: docs/gpu.md.
"""

LIBRARY_HEAD = """
## Through transformers

Any other model whose experts transformers knows by its common interface runs through the library's
own modules, with moecli's experts in them: on the processor, its KV cache in fp32, dense weights as
they are stored. A graphics card is refused where it is asked for, and else left alone, aloud.
Experts are read in the source's layout, whatever it is, and are never in memory unquantized. What a
sequence keeps is planned by running the library's code on shapes alone. Layers with a state (`*`)
take a prompt whole and what follows token by token; a conversation that was edited is computed
anew.

Of these, on tiny random models (tests/models/library_families.py): quantized and opened, logits
equal to the library's to 1e-5 in fp32 (to 5e-5 with states, whose two forms in the library differ
by so much), for a prompt in pieces and single tokens; greedy answers; the cache within its plan;
the number of parameters.

"""
LIBRARY_TAIL = """
Refused, with the reason: experts without weights (`longcat_flash`), without a gate (`nemotron_h`),
with biases or a norm of their own, of several sizes, or in no interface; encoders; code that comes
with a checkpoint.
"""


def document() -> str:
    rows = "".join(_row(name, family) for name, family in FAMILIES.items())
    variants = "".join(map(_variants, FAMILIES.values()))
    library = ", ".join(f"`{name}`{_mark(name)}" for name in LIBRARY if name not in FAMILIES)
    listed = textwrap.fill(library, 100, break_on_hyphens=False)
    own = f"{HEAD}{rows}{TAIL}\n### Variants\n\n{variants}"
    return f"{own}{LIBRARY_HEAD}{listed}.\n{LIBRARY_TAIL}"


def _mark(name: str) -> str:
    return "\\*" if name in RECURRENT else ""


def _row(name: str, family: Family) -> str:
    released = "; ".join(
        f"{model}: {_billions(spec.num_params)}, {_billions(spec.num_active_params)}"
        for model, spec in (
            (model, ModelSpec.from_hf(config)) for model, config in family.released.items()
        )
    )
    few = "compiled" if family.compiled else "plain"
    reads = "yes" if family.library_reads else "no: docs/file-format.md"
    return f"| `{name}` | {released} | {few} | {reads} |\n"


def _variants(family: Family) -> str:
    words = ", ".join(name.replace("_", " ") for name in family.variants)
    notes = "".join(f"; {note}" for note in family.notes)
    return f"- `{family.model_type}`: {words}{notes}\n"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B"


if __name__ == "__main__":
    print(document(), end="")
