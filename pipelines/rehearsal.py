"""What a training job would do, without doing it."""

import logging
from typing import Any

from pipelines import checkpoints
from pipelines.config import TrainJob
from pipelines.digits import DIGITS, LABELS
from pipelines.ingest_plan import IngestPlan
from pipelines.mlflow_door import reach
from pipelines.run_folder import RUN
from pipelines.sizing import size
from pipelines.storage import Folder
from pipelines.tracking import resolve_uri
from pipelines.training import check_claim, check_labels, check_shape, check_whole, data_source, find_data

log = logging.getLogger("brickyard.train")


def dry_run(job: TrainJob) -> dict[str, Any]:
    """Return what the job would do, having looked at the data, the run's folder and the tracker and changed nothing.

    Raises:
        ConfigurationError: if the run's folder is that of another run, or the images do not fit.
        DataError: if data or storage cannot be used, or the folder is what is left of a run.
    """
    check_whole(job)
    if job.data.builtin == "digits" and not data_source(job).names():
        form = job.data.ingest
        view = job.data.view(form.side, form.channels)
        images: int | None = DIGITS  # None: only an ingest will tell
        manifest, labels = None, LABELS
        check_labels(job, LABELS)
    else:
        _, data = find_data(job)
        manifest = data.finished() if isinstance(data, IngestPlan) else data
        if job.run.exists(RUN):
            check_claim(job, manifest)
            if manifest is None:
                log.warning("whether these images are those that %s was begun with shows after the ingest", job.run.url)
        images = data.images if isinstance(data, IngestPlan) else data.rows
        shape = data.config if isinstance(data, IngestPlan) else data
        view = job.data.view(shape.side, shape.channels)
        labels = data.labels or [""]  # of tars and of Parquet files only reading tells them
    check_shape(job, view)
    if images is not None:
        job.data.check_rows(images)
    found = checkpoints.newest(job.run)
    starts_at = found[1].position if found else 0
    return {
        "dry_run": True,
        "images_in_data": images,
        "images_held_out": job.data.held_out,
        "epochs": round(job.fit.images / (images - job.data.held_out), 1) if images else None,
        "steps": job.fit.images // job.fit.batch_images,
        "starts_at": starts_at,
        "sizing": size(
            job,
            view,
            classes=len(labels) if job.network.labels else 0,
            images=max(0, job.fit.images - starts_at),
            image_bytes=manifest.row_bytes if manifest else None,
        ),
        "tracker": reach(resolve_uri(job.tracking, Folder(job.root))),
        "run": job.run.url,
    }
