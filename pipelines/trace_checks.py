"""What can be proved of a sample's lineage: that what it names is there, and is what it was."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.entries import without_password
from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.images import Pixels
from pipelines.lineage import Trained
from pipelines.manifest import Manifest
from pipelines.mlflow_door import be_brief, check_trusted
from pipelines.plain import from_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.sample_shards import read_samples, shard_name
from pipelines.storage import Folder, absolute
from pipelines.trace_config import TraceJob

NO_STORAGE = ("http", "https", "ftp", "sftp", "ssh", "github", "data")
"""Schemes under which a picture could have us ask anybody anything."""
NOT_ASKED = "not asked"
MAX_BATCH_NUMBERS = 1 << 28


@dataclass(frozen=True, eq=False)
class Claims:
    """What is said of a sample."""

    lineage: dict[str, Any]
    seed: int
    label: int
    picture: Pixels
    """uint8 [H, W, C]."""
    is_ours: bool
    """Whether that is said by a set of samples that the caller has named, and not by the picture alone."""


def check_all(job: TraceJob, claims: Claims) -> tuple[list[str], dict[str, str]]:
    """Look at everything that a lineage names.

    Returns:
        The labels, if they are known, and what came out, by what was looked at.
    """
    lineage = claims.lineage
    data, manifest = _look(claims, str(lineage.get("data_url", "")), lineage.get("data_digest"), _data_set)
    where = job.checkpoint or str(lineage.get("checkpoint", ""))
    found, trained = _look(claims, where, lineage.get("checkpoint_digest"), _trained, is_ours=bool(job.checkpoint))
    checked = {"data": data, "checkpoint": found, "mlflow_run": _run(job, claims)}
    if job.redraw:
        checked["redraw"] = _compare(job, claims, where) if trained else f"not drawn: the checkpoint: {found}"
    labels = trained.labels if trained else manifest.labels if manifest else []
    return labels, checked


def _trained(url: str) -> tuple[str, Trained]:
    trained = Trained.find(url)
    return trained.checkpoint.digest, trained


def _data_set(url: str) -> tuple[str, Manifest]:
    manifest = Manifest.load(Folder(url))
    return manifest.digest, manifest


def _look(
    claims: Claims, url: str, digest: Any, find: Callable[[str], tuple[str, Any]], is_ours: bool = False
) -> tuple[str, Any]:
    """Say whether something is at a URL and has a digest; return it if so."""
    if not url or not digest:
        return f"{NOT_ASKED}: it is not on record", None
    if not (is_ours or claims.is_ours) and urlsplit(url).scheme in NO_STORAGE:
        return f"{NOT_ASKED}: only the picture says that it is at {url}", None
    try:
        url = absolute(url)
        found, what = find(url)
    except DamagedError as error:
        missing = "does not exist" in str(error)
        return f"{'gone' if missing else 'damaged'}: {error}", None
    except (DataError, ValueError) as error:  # a URL may be anything
        return f"gone: {error}", None
    if found != digest:
        return f"another: what is at {url} has the digest {found}", None
    return f"it is at {url}, with this digest", what


def _run(job: TraceJob, claims: Claims) -> str:
    """Say whether MLflow knows the run that trained the network."""
    lineage = claims.lineage
    recorded = str(lineage.get("tracking_uri", "")) if claims.is_ours else ""
    uri = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or recorded
    run_id = str(lineage.get("tracking_run") or "")
    if uri in ("", "none") or not run_id:
        return f"{NOT_ASKED}: {'no run is on record' if not run_id else 'give --tracking.uri'}"
    if uri == recorded:
        check_trusted(uri)
    be_brief()
    from pipelines import mlflow_find

    where = without_password(uri)
    try:
        run = mlflow_find.run_of(mlflow_find.client(where), run_id)
    except Exception as error:
        said = "does not know it" if mlflow_find.is_refusal(error) else "does not answer"
        return f"{where} {said}: {error}"
    return f"{where} knows it as {run.info.run_id}, {run.info.run_name}, {run.info.status}"


def _compare(job: TraceJob, claims: Claims, where: str) -> str:
    """Draw the sample again, and say whether it is the same."""
    if not (claims.is_ours or job.checkpoint):
        raise ConfigurationError(
            "redraw is asked for, and only the picture says where its checkpoint is; to load weights from there is not "
            f"safe: give --checkpoint {where} if you trust it, or --samples FOLDER that it lies in"
        )
    drawn = redrawn(where, claims, job.use_gpu)
    if drawn.shape != claims.picture.shape:
        return f"differs: it has the shape {drawn.shape}, the picture has {claims.picture.shape}"
    if (drawn == claims.picture).all():
        return "the same pixels, bit for bit"
    apart = np.abs(drawn.astype(int) - claims.picture)
    return f"differs: by {apart.mean():.3f} of 255 on average, {apart.max()} at most, in {(apart > 0).mean():.1%} of it"


def redrawn(url: str, claims: Claims, use_gpu: bool) -> Pixels:
    """Draw a sample again, as its lineage says, from the checkpoint at a URL: uint8 [H, W, C].

    Raises:
        ConfigurationError: if this version cannot draw as the lineage says.
    """
    said = claims.lineage.get("draw")
    if not isinstance(said, dict):
        raise ConfigurationError(f"the lineage does not say how the sample was drawn; its draw is {said!r}")
    asked = {**said, "shard_images": 1, "actors": 1, "use_gpu": use_gpu}
    draw = from_dict(DrawConfig, asked, "draw of the lineage")
    if draw.batch_images * claims.picture.size > MAX_BATCH_NUMBERS:
        raise ConfigurationError(f"draw of the lineage: batch_images is {draw.batch_images}; no memory holds that")
    labels = Trained.find(url).labels
    if 0 <= claims.label < len(labels):
        draw = replace(draw, label=labels[claims.label])  # the rest of its batch may have others
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"{claims.seed}-{claims.seed}"
        plan = plan_samples(SampleJob(checkpoint=url, out=folder, seeds=seeds, draw=draw))
        for _ in DrawShard(plan)({"id": np.array([0])}):
            pass
        drawn: Pixels = read_samples(plan.out, [shard_name(0)], plan.trained.checkpoint.shape)[0]
    return drawn
