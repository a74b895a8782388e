"""The table of docs/scaling.md, from what benchmarks/interop.py has found.

python benchmarks/interop_table.py [JSON]
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "interop.json"
COLUMNS = ("one process", "TP 2", "TP 2, expert parallel")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line for each model, scheme and kernels; answers through the HTTP server are named."""
    lines = [f"| kernels | written with | model | {' | '.join(COLUMNS)} |", "|" + "---|" * 6]
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for run in runs.values():
        row = f"{run['kernels']}, {DTYPES[run['dtype']]}", run["scheme"], run["model"]
        column = COLUMNS[2 if run["expert_parallel"] else run["ranks"] - 1]
        verdict = run["verdict"].removesuffix(f" in {run.get('tokens')} tokens")
        found = ("server: " if run["server"] else "") + verdict
        cells.setdefault(row, {}).setdefault(column, []).append(found)
    for row, found in sorted(cells.items()):
        given = ["; ".join(found.get(column, [])) for column in COLUMNS]
        lines.append(f"| {' | '.join((*row, *given))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(table(json.loads(path.read_text(encoding="utf-8"))["runs"]))
