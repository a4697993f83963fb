"""The record of a sampling job: a run of its own in MLflow, linked to the run that trained the network."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipelines import run_folder
from pipelines.entries import ModelInput
from pipelines.lineage import ray_job
from pipelines.mlflow_door import to_record_at
from pipelines.plain import flatten, to_dict, to_yaml
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import SamplePlan, identity
from pipelines.storage import Folder
from pipelines.tracking import Tracker, ending, open_tracker


@contextmanager
def recorded(job: SampleJob, plan: SamplePlan) -> Iterator[Tracker]:
    """Record a sampling job while this block draws.

    Args:
        job: the job.
        plan: what it draws.
    """
    uri = to_record_at(plan.lineage["tracking_uri"], job.tracking.uri)
    if uri == "none":
        yield Tracker()
        return
    run_folder.claim(plan.out, identity(plan))  # the folder is that of a run, as for jobs/replay.py
    # Beside a database lie the files of its experiments.
    root = Folder(str(Path(uri.removeprefix("sqlite:///")).parent)) if uri.startswith("sqlite:///") else plan.out
    lineage = plan.lineage
    tags = {
        "brickyard.kind": "samples",
        "brickyard.samples": plan.out.url,
        "brickyard.trained_by": lineage["tracking_run"],
        "brickyard.checkpoint": lineage["checkpoint"],
        "brickyard.checkpoint_digest": lineage["checkpoint_digest"],
        "brickyard.data_digest": lineage["data_digest"],
        "brickyard.git_revision": lineage["git_revision"],
        "brickyard.model_version": plan.asked.version,
        "brickyard.slot": job.firing.slot,
        "brickyard.host": socket.gethostname(),
        "brickyard.ray_job": ray_job(),
    }
    tracker = open_tracker(
        replace(job.tracking, uri=uri),
        root,
        plan.out,
        plan.out.name,
        run_folder.run_id(plan.out),
        parameters=flatten(to_dict(job)),
        tags={name: value for name, value in tags.items() if value},
        start=run_folder.count_start(plan.out, to_yaml(job)),
    )
    with ending(tracker):
        if plan.asked.model_id:
            tracker.append(ModelInput(plan.asked.address, plan.asked.model_id))
        yield tracker
