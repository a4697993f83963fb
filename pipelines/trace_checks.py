"""What can be proved of a sample's lineage: that what it names is there, and is what it was."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.entries import without_password
from pipelines.errors import ConfigurationError, DamagedError, DataError, OtherFormatError
from pipelines.images import Pixels
from pipelines.lineage import Trained
from pipelines.manifest import Manifest
from pipelines.mlflow_door import be_brief, named_here
from pipelines.plain import from_dict
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples
from pipelines.sample_shards import read_samples, shard_name
from pipelines.storage import Folder, absolute
from pipelines.trace_config import TraceJob

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
    """Whether that is said by a finished set of samples that the caller has named, and not by the image alone: by
    whoever has sent it."""


def check_all(job: TraceJob, claims: Claims) -> tuple[list[str], dict[str, str]]:
    """Look at everything that a lineage names.

    Returns:
        The labels, if they are known, and what came out, by what was looked at.
    """
    lineage = claims.lineage
    where = job.checkpoint or str(lineage.get("checkpoint", ""))
    is_named = claims.is_ours or bool(job.checkpoint)
    data = _look(str(lineage.get("data_url", "")), lineage.get("data_digest"), _data_set, claims.is_ours)
    found = _look(where, lineage.get("checkpoint_digest"), _trained, is_named)
    checked = {"data": data.said, "checkpoint": found.said, "mlflow_run": _run(job, claims)}
    if job.redraw:
        checked["redraw"] = f"not drawn: the checkpoint: {found.said}"
    if job.redraw and found.trained:
        if not is_named:
            raise ConfigurationError(
                "redraw is asked for, and only the image says where its checkpoint is; to load weights from there is "
                f"not safe: give --checkpoint {where} if you trust it, or find the image in a finished set of samples"
            )
        checked["redraw"] = _compare(found.trained, claims, job.use_gpu)
    return found.labels or data.labels or [], checked


class Seen(NamedTuple):
    """What is at a URL."""

    said: str
    """In words."""
    labels: list[str] | None = None
    trained: Trained | None = None


def _trained(url: str) -> tuple[str, list[str], Trained]:
    trained = Trained.find(url)
    return trained.digest, trained.labels, trained


def _data_set(url: str) -> tuple[str, list[str], None]:
    manifest = Manifest.load(Folder(url))
    return manifest.digest, manifest.labels, None


def _look(url: str, digest: Any, find: Callable[[str], tuple[str, list[str], Trained | None]], is_named: bool) -> Seen:
    """Say whether something is at a URL and has a digest; return it if so.

    Args:
        url: where it is said to be.
        digest: of it.
        find: finds what there is: its digest, its labels, and the network if it is one.
        is_named: whether the caller stands for the URL. Otherwise it is a stranger's: who is asked for it learns of
            that, may be sent credentials, and may answer anything, so only files are looked at.
    """
    if not url or not digest:
        return Seen(f"{NOT_ASKED}: it is not on record")
    try:
        url = absolute(url)
        if not is_named and urlsplit(url).scheme != "file":
            return Seen(f"{NOT_ASKED}: only the image says that it is at {url}")
        found, labels, trained = find(url)
    except (DataError, ValueError) as error:  # a URL may be anything
        is_damaged = isinstance(error, DamagedError) and "does not exist" not in str(error)
        word = "not known" if isinstance(error, OtherFormatError) else "damaged" if is_damaged else "gone"
        return Seen(f"{word}: {error}")
    except Exception as error:
        if is_named:
            raise
        return Seen(f"not known: {type(error).__name__}: {error}")
    if found != digest:
        return Seen(f"another: what is at {url} has the digest {found}")
    return Seen(f"it is at {url}, with this digest", labels, trained)


def _run(job: TraceJob, claims: Claims) -> str:
    """Say whether MLflow knows the run that trained the network."""
    lineage = claims.lineage
    recorded = str(lineage.get("tracking_uri", "")) if claims.is_ours else ""
    uri, run_id = named_here(recorded, job.tracking.uri), str(lineage.get("tracking_run") or "")
    if not run_id:
        return f"{NOT_ASKED}: no run is on record"
    if uri == "none":
        return f"{NOT_ASKED}: give --tracking.uri {recorded if recorded != 'none' else ''}".rstrip()
    be_brief()
    from pipelines import mlflow_find

    where = without_password(uri)
    try:
        run = mlflow_find.run_of(mlflow_find.client(where), run_id)
    except Exception as error:
        said = "does not know it" if mlflow_find.is_refusal(error) else "does not answer"
        return f"{where} {said}: {error}"
    return f"{where} knows it as {run.info.run_id}, {run.info.run_name}, {run.info.status}"


def _compare(trained: Trained, claims: Claims, use_gpu: bool) -> str:
    """Draw the sample again, and say whether it is the same."""
    channels, height, width = trained.checkpoint.shape
    if (height, width, channels) != claims.picture.shape:
        return f"differs: it has the shape {(height, width, channels)}, the picture has {claims.picture.shape}"
    drawn = redrawn(trained, claims, use_gpu)
    if (drawn == claims.picture).all():
        return "the same pixels, bit for bit"
    apart = np.abs(drawn.astype(int) - claims.picture)
    return f"differs: by {apart.mean():.3f} of 255 on average, {apart.max()} at most, in {(apart > 0).mean():.1%} of it"


def redrawn(trained: Trained, claims: Claims, use_gpu: bool) -> Pixels:
    """Draw a sample again, as its lineage says, from a checkpoint: uint8 [H, W, C].

    Raises:
        ConfigurationError: if this version cannot draw as the lineage says.
    """
    said = claims.lineage.get("draw")
    if not isinstance(said, dict):
        raise ConfigurationError(f"the lineage does not say how the sample was drawn; its draw is {said!r}")
    asked = {**said, "shard_images": 1, "actors": 1, "use_gpu": use_gpu}
    draw = from_dict(DrawConfig, asked, "draw of the lineage")
    if draw.batch_images * math.prod(trained.checkpoint.shape) > MAX_BATCH_NUMBERS:
        raise ConfigurationError(f"draw of the lineage: batch_images is {draw.batch_images}; no memory holds that")
    labels = trained.labels
    if 0 <= claims.label < len(labels):
        draw = replace(draw, label=labels[claims.label])  # the rest of its batch may have others
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"{claims.seed}-{claims.seed}"
        plan = plan_samples(SampleJob(checkpoint=trained.folder.url, out=folder, seeds=seeds, draw=draw))
        for _ in DrawShard(plan)({"id": np.array([0])}):
            pass
        drawn: Pixels = read_samples(plan.out, [shard_name(0)], plan.trained.checkpoint.shape)[0]
    return drawn
