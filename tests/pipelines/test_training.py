from dataclasses import replace

import numpy as np
import pytest

from jobs.presets import DIGITS
from pipelines.config import DataConfig, TrainJob
from pipelines.errors import ConfigurationError, DataError
from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.rehearsal import dry_run
from pipelines.run_folder import RUN
from pipelines.storage import Folder
from pipelines.tracking_config import TrackingConfig
from pipelines.training import claim, find_data
from tests.pipelines.committed import committed

JOB = replace(DIGITS, name="a", tracking=TrackingConfig(uri="none"))


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


def test_no_run_goes_on_from_what_is_left_of_another(alone: None, folder: Folder) -> None:
    """Of a folder that is deleted the claim goes first; a copy that was broken off may lack it too."""
    job = replace(JOB, root=folder.url)
    _, manifest = data_of(job)
    claim(job, manifest)
    committed(job.run, classes=0)
    assert claim(job, manifest)[1] == 2
    kept = job.run.get(RUN)
    job.run.filesystem.rm(job.run.path(RUN))
    for other in (job, replace(job, seed=1)):
        for attempt in (dry_run, lambda job: claim(job, manifest)):
            with pytest.raises(DataError, match=rf"holds checkpoint-000000000128 and no {RUN}.*another --name"):
                attempt(other)
    assert not job.run.exists(RUN)
    job.run.put(RUN, kept)
    assert claim(job, manifest)[1] == 3
    for name in job.run.names():
        (job.run / name).delete()
    assert claim(replace(job, seed=1), manifest)[1] == 1, "nothing of it is left, and another may have the name"
