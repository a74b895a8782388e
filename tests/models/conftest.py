"""Fixtures of tests of compiled steps."""

from collections.abc import Iterator

import pytest

from quant import ops
from tests.models.few_runs import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def plain_pytorch() -> Iterator[None]:
    """What is compared with: the decoder itself then never takes the compiled way."""
    before = ops.current_backend()
    ops.set_backend("reference")
    yield
    ops.set_backend(before)
