"""The page about families says what the tests check; error messages and README name them all."""

from pathlib import Path

import pytest

from moecli.errors import MoecliError
from moecli.models.config import ModelSpec
from tests.models.families import FAMILIES
from tools.models_doc import document

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    """docs/models.md is made by tools/models_doc.py, which says how."""
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == document()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_named_where_another_is_refused_and_in_the_readme(family: str) -> None:
    with pytest.raises(MoecliError) as caught:
        ModelSpec.from_hf({"architectures": ["Zorp"], "num_experts": 8})
    assert family in caught.value.hint
    assert FAMILIES[family].title in (ROOT / "README.md").read_text(encoding="utf-8")
