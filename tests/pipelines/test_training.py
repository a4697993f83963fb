import numpy as np
import pytest

from pipelines.config import DataConfig, TrainJob
from pipelines.errors import ConfigurationError
from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.storage import Folder
from pipelines.training import claim, find_data


def data_of(job: TrainJob) -> tuple[Folder, Manifest]:
    out, plan = find_data(job)
    assert isinstance(plan, IngestPlan)
    return out, ingest(plan)


@pytest.mark.parametrize("encoding", ["raw", "in-place"])
def test_a_run_is_refused_when_its_raw_images_are_others(encoding, alone: None, folder: Folder) -> None:
    for i in range(5):
        (folder / "raw").put(f"{i}.png", encode(np.full((8, 8, 1), i, np.uint8), "png"))
    form = IngestConfig(side=8 if encoding == "raw" else 0, channels=1, encoding=encoding)
    job = TrainJob(name="a", root=folder.url, data=DataConfig(url=f"{folder.url}/raw", side=8, ingest=form))
    out, manifest = data_of(job)
    assert claim(job, manifest)[1] == 1
    assert data_of(job) == (out, manifest)
    assert claim(job, manifest)[1] == 2
    (folder / "raw").put("3.png", encode(np.full((8, 8, 1), 200, np.uint8), "png"))
    elsewhere, changed = data_of(job)
    assert elsewhere != out
    with pytest.raises(ConfigurationError, match=rf"data digest was {manifest.digest}, is {changed.digest}"):
        claim(job, changed)
