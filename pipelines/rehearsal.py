"""What a training job would do, without doing it."""

import logging
from typing import Any

import torch
from torch import Tensor

from models.network import build
from models.parallelize import checkpoint_activations
from pipelines import checkpoints
from pipelines.config import TrainJob
from pipelines.digits import DIGITS, LABELS
from pipelines.images import View
from pipelines.ingest_plan import IngestPlan
from pipelines.mlflow_door import reach
from pipelines.run_folder import RUN
from pipelines.storage import Folder
from pipelines.tracking import resolve_uri
from pipelines.training import check_claim, check_labels, check_shape, data_source, find_data

log = logging.getLogger("brickyard.train")


def dry_run(job: TrainJob) -> dict[str, Any]:
    """Return what the job would do, having looked at the data, the run's folder and the tracker and changed nothing.

    Raises:
        ConfigurationError: if the run's folder is that of another run, or the images do not fit.
        DataError: if data or storage cannot be used.
    """
    if job.data.builtin == "digits" and not data_source(job).names():
        form = job.data.ingest
        view = job.data.view(form.side, form.channels)
        images: int | None = DIGITS  # None: only an ingest will tell
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
    check_shape(job, view)
    if images is not None:
        job.data.check_rows(images)
    found = checkpoints.newest(job.run)
    return {
        "dry_run": True,
        "images_in_data": images,
        "images_held_out": job.data.held_out,
        "epochs": round(job.fit.images / (images - job.data.held_out), 1) if images else None,
        "steps": job.fit.images // job.fit.batch_images,
        "starts_at": found[1].position if found else 0,
        "memory_per_worker_bytes": memory_per_worker(job, view),
        "tracker": reach(resolve_uri(job.tracking, Folder(job.root))),
        "run": job.run.url,
    }


def memory_per_worker(job: TrainJob, view: View) -> int:
    """Estimate what a worker's model, gradient, optimizer, averages and saved activations take, in bytes."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        model = build(job.network, view.channels, view.side, classes=int(job.network.labels))
        if job.parallel.checkpoint_activations:
            checkpoint_activations(model)
        x = torch.empty(job.fit.micro_images, view.channels, view.side, view.side)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, torch.zeros(len(x), dtype=torch.long))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 5 + len(job.fit.ema.power_stds)  # weights, gradient, two moments, the averages
    if not job.scaling.use_gpu:
        copies += copies - 1  # what is being saved, all but the gradient, lies in the same memory
    # Least of all workers that there may be: then each has the largest part.
    shares = job.parallel.shares(job.scaling.min_workers or job.scaling.workers)
    return copies * weights // shares + sum(saved.values())
