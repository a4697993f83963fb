"""A training job from its beginning to its end: data → workers → checkpoints → samples → score, and the record of it.

All of this runs in the driver; what the workers do is in :mod:`pipelines.worker`.
"""

import logging
import math
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from models.network import build
from pipelines import checkpoints, run_folder, snapshots, validation
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.cluster import cluster
from pipelines.config import TrainJob
from pipelines.digits import write_digits
from pipelines.entries import DataSet, without_password
from pipelines.errors import ConfigurationError, checked
from pipelines.features import MAX_PIXELS
from pipelines.images import View
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestPlan
from pipelines.lineage import Trained, git_revision, ray_job
from pipelines.manifest import NAME, Manifest
from pipelines.metrics import CHECKPOINT, at_work
from pipelines.plain import flatten, to_dict, to_yaml
from pipelines.results import evaluate, export, record_results
from pipelines.scoring import METRIC
from pipelines.storage import Folder
from pipelines.summary import in_words
from pipelines.tracking import Tracker, ending, open_tracker, resolve_uri
from pipelines.validation import Validator
from pipelines.workers import run_workers

DATA = "data digest"
"""Its place in what makes a run the run that it is."""

log = logging.getLogger("brickyard.train")


def train(job: TrainJob) -> dict[str, Any]:
    """Train, then sample and score if asked to. The same command continues what was interrupted.

    Returns:
        What was done: where it is, how long it took, the last loss, the score.

    Raises:
        ConfigurationError: if the run's folder holds a run of another configuration or of other data.
        DataError: if data or storage cannot be used.
        DivergedError: if the gradient is not finite.
        TryAgainError: if workers failed more often than allowed.
    """
    began = time.perf_counter()
    resolve_uri(job.tracking, Folder(job.root))  # before hours of an ingest
    with ExitStack() as stack:
        data, manifest = prepare(job, stack)
        summary = _train_on(job, data, manifest)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    log.info("%s", in_words(summary))
    return summary


def prepare(job: TrainJob, stack: ExitStack) -> tuple[Folder, Manifest]:
    """Return a job's data set, which is ingested before if it must be.

    Args:
        job: which.
        stack: is given the cluster to ingest on, if one is needed; what follows may use it.

    Raises:
        DataError: if data or storage cannot be used.
        ConfigurationError: if the images do not fit the job.
    """
    data, found = find_data(job)
    if isinstance(found, IngestPlan) and not found.complete:
        stack.enter_context(cluster())
    manifest = ingest(found, job.data.wanted_labels) if isinstance(found, IngestPlan) else found
    check_labels(job, manifest.labels)  # of tars and of Parquet files only reading tells them
    job.data.check_rows(manifest.rows)
    return data, manifest


def _train_on(job: TrainJob, data: Folder, manifest: Manifest) -> dict[str, Any]:
    shape = job.data.view(manifest.side, manifest.channels).shape
    log.info("data: %d images, seen at %s, digest %s", manifest.rows, "x".join(map(str, shape)), manifest.digest[:12])
    run_id, start = claim(job, manifest)
    tracker = open_tracker(
        job.tracking,
        Folder(job.root),
        job.run,
        job.name,
        run_id,
        parameters=flatten(to_dict(job))
        | {"data_digest": manifest.digest, "parameters": count_parameters(job, manifest)},
        tags={
            "brickyard.git_revision": git_revision(),
            "brickyard.data_digest": manifest.digest,
            "brickyard.workers": str(job.scaling.workers),
            "brickyard.host": socket.gethostname(),
        }
        | ({"brickyard.ray_job": submitted} if (submitted := ray_job()) else {}),
        start=start,
    )
    with ending(tracker):
        tracker.file("config.yaml", to_yaml(job).encode())
        profile = {"rows": manifest.rows, "labels": dict(zip(manifest.labels, manifest.label_counts, strict=True))}
        tracker.append(DataSet(data.name, manifest.digest, data.url, profile))
        about = describe(job, data, manifest, tracker)
        with cluster(), at_work(job.name), Validator(job, data, manifest, tracker) as validator:
            summary = _train(job, data, manifest, about, tracker, validator)
            trained = Trained.find(job.run.url)  # once: it reads every byte
            validator.take(trained.checkpoint.position)  # in case that word of it was lost
            tracker.tags({"brickyard.export": export(job, trained)})
            if job.evaluate_images:
                summary |= evaluate(job, trained, tracker)
        if validator.last:
            summary |= validator.last.means
        measured = {name: summary[name] for name in (METRIC, validation.METRIC, "loss") if name in summary}
        record_results(job, trained, validator.last, measured, tracker)
    return summary | {
        "run": job.run.url,
        "images": trained.checkpoint.position,
        "data_digest": manifest.digest,
        "mlflow_run": tracker.tracker_id,
        "see": tracker.see,
    }


def _train(
    job: TrainJob, data: Folder, manifest: Manifest, about: Checkpoint, tracker: Tracker, validator: Validator
) -> dict[str, Any]:
    found = checkpoints.newest(job.run, verified=False)  # those who start the workers read every byte
    if found and found[1].position >= job.fit.images:
        found = checkpoints.newest(job.run)  # but here nobody else would
    if found:
        validator.take(found[1].position)  # an earlier start may have been killed before it was measured
    if found and found[1].position >= job.fit.images:
        log.info("%s has seen its %d images; nothing to train", job.run.url, found[1].position)
        return {"trained_images": 0}
    CHECKPOINT.set(job.name, lost_since(job.run, found[0] if found else None))
    log.info("starting %d workers", job.scaling.workers)
    if idle := job.fit.idle_share(job.scaling.workers):
        log.warning(
            "%d workers share out %d micro-batches of each global batch: they wait %.0f %% of their time; a number of "
            "workers that divides them, or a smaller fit.micro_images, would not",
            job.scaling.workers,
            job.fit.micro_batches,
            100 * idle,
        )
    return run_workers(job, data, manifest, about, tracker, validator.take)


def lost_since(run: Folder, checkpoint: Folder | None) -> float:
    """Return since when a crash would lose work, unix time: the newest checkpoint's commit, or the run's first start.
    A later start changes nothing: a job may be started again and again, and make no checkpoint."""
    written = checkpoint.written_at(checkpoints.MANIFEST) if checkpoint else run.written_at(run_folder.RUN)
    return time.time() if written is None else written


def find_data(job: TrainJob) -> tuple[Folder, Manifest | IngestPlan]:
    """Return a job's data set: where it is and its manifest, or, of raw images, how it is to be made.

    Raises:
        DataError: if there are no images, or storage refuses.
        ConfigurationError: if the images do not fit the network.
    """
    source = data_source(job)
    if source.exists(NAME):
        manifest = Manifest.load(source)
        check_shape(job, job.data.view(manifest.side, manifest.channels))
        check_labels(job, manifest.labels)
        return source, manifest
    check_shape(job, job.data.view(job.data.ingest.side, job.data.ingest.channels))
    if job.data.builtin == "digits":
        write_digits(source)
    listed = IngestPlan.make(source, data_folder(job), job.data.ingest)
    # Images that are others now are another data set, in a folder of its own: the run that had the old ones is refused
    # by its digest, and a new one goes on.
    out = Folder(f"{listed.out.url}-{listed.digest[:8]}")
    found = replace(listed, out=out)
    if found.labels is not None:
        check_labels(job, found.labels)
    return out, found


def check_shape(job: TrainJob, view: View) -> None:
    """Raise ConfigurationError unless the network, and the score if there is to be one, take pictures so seen."""
    with checked():
        job.network.check_side(view.side)
    pixels = math.prod(view.shape)
    if job.evaluate_images and pixels > MAX_PIXELS:
        raise ConfigurationError(
            f"evaluate_images is {job.evaluate_images}; the score knows pixels only, up to {MAX_PIXELS} of them, and "
            f"these images have {pixels}: give --evaluate-images 0, and draw samples with jobs/sample.py"
        )
    for sentence in job.network.idle_settings(view.side):
        log.warning("%s", sentence)


def check_labels(job: TrainJob, labels: list[str]) -> None:
    """Raise ConfigurationError if labels are to be learned, or to be drawn, that the data set does not have."""
    with checked():
        job.network.check_classes(len(labels))
    if job.draw.label and job.draw.label not in labels:
        known = ", ".join(labels) or "there are none"
        raise ConfigurationError(f"draw.label is {job.draw.label!r}; it must be a label of the data: {known}")


def data_source(job: TrainJob) -> Folder:
    """Return where the images of a job come from."""
    if job.data.builtin == "digits":
        return Folder(job.root) / "data" / "digits"
    return Folder(job.data.url)


def data_folder(job: TrainJob) -> Folder:
    """Return where the raw images of a job are ingested to, but for what the listing adds to the name."""
    form = job.data.ingest
    return Folder(job.root) / "data" / f"{data_source(job).name}-{form.side}x{form.side}x{form.channels}"


def identity(job: TrainJob, manifest: Manifest | None) -> dict[str, Any]:
    """Return what makes a run the run that it is. The rest (length, workers, reports …) may change between starts.

    Without a manifest it is all but the data.
    """
    everything = flatten(to_dict(job))
    may_change = ("name", "root", "fit.images", "fit.micro_images", "fit.log_images", "fit.checkpoint_images",
                  "fit.grid_images", "fit.not_finite", "evaluate_images", "keep_checkpoints", "parallel.strategy",
                  "parallel.shards", "parallel.checkpoint_activations", "parallel.compile")  # fmt: skip
    groups = (
        "data.url",
        "data.builtin",
        "data.ingest.",
        "data.node_labels",
        "data.keep_gb",
        "scaling.",
        "tracking.",
        "draw.",
        "sizing.",
    )
    kept = {k: v for k, v in everything.items() if k not in may_change and not k.startswith(groups)}
    return kept | ({DATA: manifest.digest} if manifest else {})


def claim(job: TrainJob, manifest: Manifest) -> tuple[str, int]:
    """Write down what the run is, at its first start; later, refuse one that is another.

    Returns:
        An id that no other run has, wherever it is recorded; and which start this is.

    Raises:
        ConfigurationError: naming each field that differs.
        DataError: if the folder has weights and does not say of which run.
    """
    check_whole(job)
    if not run_folder.claim(job.run, identity(job, manifest)):
        check_claim(job, manifest)
    return run_folder.run_id(job.run), run_folder.count_start(job.run, to_yaml(job))


def check_whole(job: TrainJob) -> None:
    """Raise DataError if the run's folder has weights and does not say of which run: any would go on from them."""
    run_folder.check_whole(job.run, run_folder.RUN, (checkpoints.PREFIX, snapshots.FOLDER), "--name")


def check_claim(job: TrainJob, manifest: Manifest | None) -> None:
    """Raise ConfigurationError if the run's folder is that of another run, naming each field that differs.

    Images that are not ingested yet have no manifest: whether they are those of the run shows later.
    """
    mine, theirs = identity(job, manifest), run_folder.identity(job.run)
    if manifest is None:
        theirs.pop(DATA, None)
    differing = [
        f"{name} was {theirs.get(name, 'unknown to the version that began it')}, is {mine.get(name)}"
        for name in sorted(mine | theirs)
        if mine.get(name) != theirs.get(name)
    ]
    if differing:
        raise ConfigurationError(
            f"{job.run.url} is another run: {'; '.join(differing)}. Give this one another --name, or repeat the "
            "settings of that one to continue it"
        )


def describe(job: TrainJob, data: Folder, manifest: Manifest, tracker: Tracker) -> Checkpoint:
    """Return the manifest of the run's checkpoints, but for the position and the files."""
    view = job.data.view(manifest.side, manifest.channels)
    return Checkpoint(
        position=0,
        files={},
        config=to_dict(job),
        data_digest=manifest.digest,
        data_url=data.url,
        shape=(view.channels, view.side, view.side),
        labels=manifest.labels,
        tracking_uri=without_password(resolve_uri(job.tracking, Folder(job.root))),
        tracking_run=tracker.run_id,
        git_revision=git_revision(),
    )


def count_parameters(job: TrainJob, manifest: Manifest) -> int:
    """Return the number of the network's parameters, without making them."""
    with torch.device("meta"):
        view = job.data.view(manifest.side, manifest.channels)
        model = build(job.network, view.channels, view.side, len(manifest.labels))
        return sum(p.numel() for p in model.parameters())
