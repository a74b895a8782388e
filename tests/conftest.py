"""Where there is no GPU, Triton's kernels run in its interpreter: said before it is imported.

And whoever computes in one test is not who computes in the next.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def kernels_of_their_own() -> Iterator[None]:
    """Undo what a test has chosen for the whole process, as opening an engine does."""
    yield
    for name in ("quant.ops", "moecli.models.fused", "offload.device_ops"):
        if name in sys.modules:
            sys.modules[name].set_backend("auto")
    if "offload.lane_ops" in sys.modules:
        sys.modules["offload.lane_ops"].interpret_kernels(False)
