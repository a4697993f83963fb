from pathlib import Path

import pytest

from pipelines.fit import FitConfig
from pipelines.storage import Folder
from tests.pipelines.helpers import FIT


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "store"))


@pytest.fixture
def tiny_fit() -> FitConfig:
    return FIT
