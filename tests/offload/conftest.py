from pathlib import Path

import pytest

from tests.offload.offload_files import ModelFiles


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A model nobody writes to; tests that damage files make their own."""
    return ModelFiles(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_files(tmp_path: Path) -> ModelFiles:
    return ModelFiles(tmp_path)
