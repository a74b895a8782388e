"""The doorbell's kernels as a graphics card would get them: compiled here, run elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

# Without TRITON_INTERPRET, which the tests of this process run kernels with.
_COMPILE = """
import re, sys
sys.path[:0] = sys.argv[1:]
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from offload.kernels import doorbell
arguments = {
    "hidden": "*bf16", "topk_ids": "*i64", "topk_weights": "*fp32", "mask": "*i32", "state": "*i64",
    "partial": "*fp32", "addresses": "*i64", "layer_index": "i32", "num_tokens": "i32",
    "num_values": "i32", "num_choices": "i32", "num_experts": "i32", "max_spins": "i32",
}
blocks = {"BLOCK": 1024, "BLOCK_CHOICES": 8, "BLOCK_EXPERTS": 128}
for name in ("_write_request", "_ring_bell", "_await_reply", "_take_reply"):
    kernel = getattr(doorbell, name)
    names = kernel.arg_names  # an address of main memory is whatever is not listed above
    types = {n: "constexpr" if n in blocks else arguments.get(n, "i64") for n in names}
    constants = {(i,): blocks[n] for i, n in enumerate(names) if n in blocks}
    source = ASTSource(kernel, types, constants)
    for capability in (75, 120):
        text = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        accesses = re.findall(r"(?:ld|st|atom)\\.(?:[a-z_.]*)", text)
        print(name, *(a for a in accesses if re.search("volatile|wt|sys", a)))
"""


def test_the_kernels_compile_and_keep_their_promises_of_order(tmp_path: Path) -> None:
    """What is polled is loaded anew each time; a fence for the whole system precedes the bell."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE, *sys.path],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    found = [line.split() for line in result.stdout.splitlines()]
    assert len(found) == 8
    accesses = {name: " ".join(kinds) for name, *kinds in found}
    assert accesses["_write_request"] == ""
    assert "atom.global.sys.acq_rel.add" in accesses["_ring_bell"]
    assert "st.global.wt" in accesses["_ring_bell"]
    assert accesses["_await_reply"].count("ld.volatile.global") == 2  # first, and in the loop
    assert "atom.global.sys.acq_rel.exch" in accesses["_await_reply"]
    assert "st.global.wt" in accesses["_await_reply"]
    assert "ld.volatile.global" in accesses["_take_reply"]  # which parts there are
