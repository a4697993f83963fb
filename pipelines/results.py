"""What a run leaves at its end: an export of the weights, samples, a score, and the record of them."""

import hashlib
import json
import logging
from typing import Any

import safetensors.torch

from pipelines import exports
from pipelines.config import TrainJob
from pipelines.entries import ABOUT, Model
from pipelines.exchange import write_pipeline
from pipelines.figures import loss_figure, schedule_figure
from pipelines.lineage import Trained, installed
from pipelines.plain import to_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.sampling import SHEET, STRIP, draw_samples
from pipelines.score_config import ScoreJob
from pipelines.scoring import METRIC, score
from pipelines.storage import Folder
from pipelines.tracking import Tracker, now_ms
from pipelines.validation import Curve

log = logging.getLogger("brickyard.train")


def export(job: TrainJob, trained: Trained) -> str:
    """Write ε_θ and its average as safetensors with a config.json into the run's ``export/``; return its URL.

    Where `diffusers` can say what it is, the folder is a ``DDPMPipeline`` of the average too.
    """
    folder = job.run / "export"
    files = {}
    for name, averaged in ((exports.LAST, False), (exports.AVERAGE, True)):
        weights = {k: v.contiguous() for k, v in trained.network(averaged).state_dict().items()}
        data = safetensors.torch.save(weights)
        folder.put(name, data)
        files[name] = len(data), hashlib.sha256(data).hexdigest()
    folder.put(ABOUT, exports.describe(trained.checkpoint, trained.digest, files))
    write_pipeline(folder, job.network, trained.target, trained.checkpoint, weights, trained.schedule())
    return folder.url


def evaluate(job: TrainJob, trained: Trained, tracker: Tracker) -> dict[str, Any]:
    """Draw samples from the newest checkpoint, score them, and record both."""
    position = trained.checkpoint.position
    # Other settings, or other weights at the same position, make other samples, in a folder of their own.
    what = [trained.checkpoint.digest, to_dict(job.draw), job.evaluate_images]
    tag = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    folder = Folder(job.root) / "samples" / f"{job.name}-{position}-{tag}"
    seeds = f"0-{job.evaluate_images - 1}"
    drawn = draw_samples(
        plan_samples(SampleJob(checkpoint=trained.folder.url, out=folder.url, seeds=seeds, draw=job.draw))
    )
    log.info("score: comparing %d samples with the data", job.evaluate_images)
    result = score(ScoreJob(samples=folder.url))
    tracker.metrics({METRIC: result[METRIC]}, position, anew=True)
    drawn_by, data = f"{job.draw.steps} {job.draw.sampler} steps", result["reference_digest"][:12]
    tracker.tags({"brickyard.scored_on": f"{job.evaluate_images} samples, {drawn_by}, data {data}"})
    for name in (SHEET, STRIP):
        tracker.file(name, folder.get(name))
    return {
        METRIC: result[METRIC],
        "samples": drawn["samples"],
        "contact_sheet": drawn["contact_sheet"],
        "strip": drawn["strip"],
    }


def record_results(
    job: TrainJob, trained: Trained, curve: Curve | None, measured: dict[str, float], tracker: Tracker
) -> None:
    """Record what a reader looks for at the end, and the exported average as a model with what was measured of it."""
    if not tracker.run_id:
        return
    tracker.file("schedule.png", schedule_figure(trained.schedule()))
    tracker.file("environment.txt", installed().encode())
    if curve:
        tracker.file("loss-over-t.png", loss_figure(curve))
    if job.tracking.log_model:
        checkpoint, folder = trained.checkpoint, job.run / "export"
        sizes = {stored.name: stored.size_bytes for stored in folder.find()}
        tracker.append(
            Model(
                name=job.name,
                digest=checkpoint.digest,
                checkpoint=trained.folder.url,
                folder=folder.url,
                files=[exports.AVERAGE, ABOUT],
                size_bytes=sizes[exports.AVERAGE] + sizes[ABOUT],
                position=checkpoint.position,
                at_ms=now_ms(),
                metrics=measured,
                data_name=Folder(checkpoint.data_url).name,
                data_digest=checkpoint.data_digest,
                register=job.tracking.register,
            )
        )
