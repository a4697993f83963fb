from pathlib import Path

import pytest

from pipelines import ingest
from pipelines.fit_config import FitConfig
from pipelines.parts import do
from pipelines.storage import Folder
from tests.pipelines.states import FIT


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "store"))


@pytest.fixture
def tiny_fit() -> FitConfig:
    return FIT


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tasks of an ingest run in this process: what they do is the same, and Ray need not start."""
    monkeypatch.setattr(ingest, "do", lambda runs, task, *_: do(runs, task, False))
