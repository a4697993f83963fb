"""Which samples a job is to draw, and of what they are a function."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.config import DrawConfig, SampleJob
from pipelines.errors import ConfigurationError
from pipelines.lineage import Trained, git_revision
from pipelines.storage import Folder

WHAT_A_SAMPLE_DEPENDS_ON = (
    "sampler", "steps", "spacing", "eta", "label", "guidance", "clip", "weights", "ema_std", "batch_images",
)  # fmt: skip


@dataclass(frozen=True)
class SamplePlan:
    """Which seeds go into which shard, drawn how."""

    trained: Trained
    out: Folder
    seeds: range
    draw: DrawConfig
    lineage: dict[str, Any]

    @property
    def shards(self) -> int:
        return -(-len(self.seeds) // self.draw.shard_images)

    def shard_name(self, shard: int) -> str:
        return f"part-{shard:06d}.parquet"

    def labels(self, seeds: Tensor) -> Tensor:
        """Return the label that each seed is drawn with, -1 for none; both int64 [n]."""
        names = self.trained.labels
        if not names:
            return torch.full_like(seeds, -1)
        return torch.full_like(seeds, names.index(self.draw.label)) if self.draw.label else seeds % len(names)

    def shard_seeds(self, shard: int) -> range:
        return self.seeds[shard * self.draw.shard_images : (shard + 1) * self.draw.shard_images]


def plan_samples(job: SampleJob) -> SamplePlan:
    """Resolve what a job is to draw, from which checkpoint.

    Raises:
        DataError: if there is no checkpoint.
        ConfigurationError: if the sampler does not fit the checkpoint's schedule.
    """
    trained = Trained.find(job.checkpoint)
    checkpoint = trained.checkpoint
    if job.draw.steps > trained.schedule().steps:
        raise ConfigurationError(
            f"draw.steps is {job.draw.steps}; it must be at most the T of the checkpoint, {trained.schedule().steps}"
        )
    check_labels(job.draw, trained)
    if job.draw.ema_std and not checkpoint.snapshots:
        raise ConfigurationError(
            f"draw.ema_std is {job.draw.ema_std}; {trained.folder.url} has no snapshots to make it of: train with "
            "fit.ema.power_stds 0.05 0.10, or leave it at 0"
        )
    lineage = {
        "checkpoint": trained.folder.url,
        "checkpoint_digest": checkpoint.digest,
        "position": checkpoint.position,
        "zoom": trained.view.zoom,
        "tracking_uri": checkpoint.tracking_uri,
        "tracking_run": checkpoint.tracking_run,
        "data_digest": checkpoint.data_digest,
        "data_url": checkpoint.data_url,
        "draw": {name: getattr(job.draw, name) for name in WHAT_A_SAMPLE_DEPENDS_ON},
        "git_revision": git_revision(),
    }
    return SamplePlan(trained, Folder(job.out), job.seed_range, job.draw, lineage)


def check_labels(draw: DrawConfig, trained: Trained) -> None:
    """Raise ConfigurationError if labels are asked for that the network does not know."""
    if (draw.label or draw.guidance != 1) and not trained.labels:
        field = "label" if draw.label else "guidance"
        raise ConfigurationError(
            f"draw.{field} is {getattr(draw, field)}; the network of {trained.folder.url} knows no labels: train one "
            "with network.labels"
        )
    if draw.label and draw.label not in trained.labels:
        raise ConfigurationError(f"draw.label is {draw.label!r}; the network knows {', '.join(trained.labels)}")


def identity(plan: SamplePlan) -> dict[str, Any]:
    """Return what makes a set of samples the one that it is."""
    settings = {**plan.lineage, "shard_images": plan.draw.shard_images}
    settings["seeds"] = [plan.seeds.start, plan.seeds.stop - 1]
    # The digest says which checkpoint, wherever it lies now and whoever keeps the record.
    for name in ("git_revision", "checkpoint", "data_url", "tracking_uri"):
        del settings[name]
    return settings


def check_claim(plan: SamplePlan) -> None:
    """Refuse a folder that holds other samples."""
    mine, theirs = identity(plan), json.loads(plan.out.get("plan.json"))
    for name in mine:
        if mine[name] != theirs.get(name):
            raise ConfigurationError(
                f"{plan.out.url} holds other samples: their {name} is {theirs.get(name)}, this job's is {mine[name]}; "
                "give another --out, or delete that folder"
            )
