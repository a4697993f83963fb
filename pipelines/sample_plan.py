"""Which samples a job is to draw, and of what they are a function."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines import networks, run_folder
from pipelines.draw_config import DrawConfig
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.lineage import Trained, git_revision
from pipelines.networks import Asked
from pipelines.sample_config import SampleJob
from pipelines.sample_shards import SHARD, Form
from pipelines.storage import Folder

WHAT_A_SAMPLE_DEPENDS_ON = (
    "sampler", "steps", "spacing", "eta", "label", "guidance", "clip", "weights", "ema_std", "batch_images", "compile",
)  # fmt: skip
CLAIM = "plan.json"
"""Says which samples a folder is for."""
LATER: dict[str, Any] = {"labels_digest": "", "also": []}
"""What folders of older versions do not say, and mean."""


@dataclass(frozen=True)
class LabelTable:
    """The label of each seed, as a table says it."""

    labels: dict[int, int]
    """Indices into the network's labels, by seed."""
    digest: str
    """The sha256 of what it says."""

    @staticmethod
    def read(url: str, seeds: range, names: list[str]) -> "LabelTable":
        """Read a CSV with the columns seed and label.

        Raises:
            ConfigurationError: if it does not say a label that the network knows for each seed.
            DataError: if it cannot be read.
        """
        folder, _, file = url.rpartition("/")
        index = {name: i for i, name in enumerate(names)}
        said: dict[int, str] = {}
        try:
            for row in csv.DictReader(io.StringIO(Folder(folder).get(file).decode("utf-8-sig"))):
                said[int(row["seed"])] = row["label"]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise DataError(f"labels is {url}; it must be a CSV with the columns seed and label: {error!r}") from error
        without = next((seed for seed in seeds if seed not in said), None)
        if without is not None:
            raise ConfigurationError(f"labels is {url}, which has no line for seed {without}: each seed needs one")
        unknown = next((seed for seed in seeds if said[seed] not in index), None)
        if unknown is not None:
            known = f"the network knows {', '.join(names)}" if names else "the network knows no labels"
            raise ConfigurationError(f"labels is {url}; seed {unknown} has {said[unknown]!r}: {known}")
        labels = {seed: index[said[seed]] for seed in seeds}
        return LabelTable(labels, hashlib.sha256(json.dumps([labels[seed] for seed in seeds]).encode()).hexdigest())

    def of(self, seeds: Tensor) -> Tensor:
        """Return the labels of seeds, both int64 [n]; what only fills a batch up has any."""
        return torch.tensor([self.labels.get(seed, 0) for seed in seeds.tolist()], device=seeds.device)


@dataclass(frozen=True)
class SamplePlan:
    """Which seeds go into which shard, drawn how."""

    asked: Asked
    out: Folder
    seeds: range
    draw: DrawConfig
    lineage: dict[str, Any]
    table: LabelTable | None = None
    """The label of each seed, if they are told one by one."""
    also: tuple[Form, ...] = ()
    """What is written beside Parquet."""

    @property
    def trained(self) -> Trained:
        return self.asked.trained

    @property
    def shards(self) -> int:
        return -(-len(self.seeds) // self.draw.shard_images)

    def labels(self, seeds: Tensor) -> Tensor:
        """Return the label that each seed is drawn with, -1 for none; both int64 [n]."""
        names = self.trained.labels
        if not names:
            return torch.full_like(seeds, -1)
        if self.table:
            return self.table.of(seeds)
        return torch.full_like(seeds, names.index(self.draw.label)) if self.draw.label else seeds % len(names)

    def shard_seeds(self, shard: int) -> range:
        return self.seeds[shard * self.draw.shard_images : (shard + 1) * self.draw.shard_images]


def plan_samples(job: SampleJob, keep: Folder | None = None) -> SamplePlan:
    """Resolve what a job is to draw, from which checkpoint.

    Args:
        job: the job.
        keep: where to put weights that MLflow alone has; None for the folder of the samples.

    Raises:
        DataError: if there is no checkpoint.
        ConfigurationError: if the sampler does not fit the checkpoint's schedule, or the labels the seeds.
        TryAgainError: if MLflow is asked for the checkpoint and does not answer.
    """
    out = Folder(job.out)
    # The first job in a folder has decided which network an alias, or the newest checkpoint, means.
    claimed = json.loads(out.get(CLAIM)).get("asked", {}) if out.exists(CLAIM) else {}
    meant = claimed if claimed.get("address") == job.checkpoint else None
    asked = networks.find(job.checkpoint, job.tracking.uri, keep or out, meant)
    trained = asked.trained
    checkpoint = trained.checkpoint
    if job.draw.steps > trained.schedule().steps:
        raise ConfigurationError(
            f"draw.steps is {job.draw.steps}; it must be at most the T of the checkpoint, {trained.schedule().steps}"
        )
    check_labels(job.draw, trained)
    table = LabelTable.read(job.labels, job.seed_range, trained.labels) if job.labels else None
    if job.draw.ema_std and not checkpoint.snapshots:
        raise ConfigurationError(
            f"draw.ema_std is {job.draw.ema_std}; {trained.folder.url} has no snapshots to make it of: train with "
            "fit.ema.power_stds 0.05 0.10, or leave it at 0"
        )
    settings = {name: getattr(job.draw, name) for name in WHAT_A_SAMPLE_DEPENDS_ON}
    if not job.draw.compile:
        del settings["compile"]  # as it was before there was one
    lineage = {
        "checkpoint": trained.folder.url,
        "checkpoint_digest": trained.digest,
        "position": checkpoint.position,
        "zoom": trained.view.zoom,
        "tracking_uri": checkpoint.tracking_uri,
        "tracking_run": checkpoint.tracking_run,
        "data_digest": checkpoint.data_digest,
        "data_url": checkpoint.data_url,
        "draw": settings,
        "git_revision": git_revision(),
    }
    lineage["labels_digest"] = table.digest if table else ""
    if asked.version:
        lineage["model_version"] = asked.version
    return SamplePlan(asked, out, job.seed_range, job.draw, lineage, table, job.also)


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
    settings["also"] = list(plan.also)
    # The digest says which checkpoint, wherever it lies now and whoever keeps the record.
    for name in ("git_revision", "checkpoint", "data_url", "tracking_uri", "model_version"):
        settings.pop(name, None)
    return settings


def claim(plan: SamplePlan) -> None:
    """Write down, once for all jobs in a folder, which samples it is for and how the network was found.

    Raises:
        ConfigurationError: if the folder is for other samples.
        DataError: if it holds samples and does not say which.
        TryAgainError: if another job has just begun there with another network of the same address.
    """
    check_whole(plan.out)
    asked = {
        "address": plan.asked.address,
        "model_id": plan.asked.model_id,
        "version": plan.asked.version,
        "checkpoint": plan.trained.folder.url,
        "digest": plan.trained.digest,
    }
    if not plan.out.create(CLAIM, json.dumps({**identity(plan), "asked": asked}, indent=1).encode()):
        check_claim(plan)


def check_whole(out: Folder) -> None:
    """Raise DataError if a folder has shards and does not say of which samples: they would be taken for any."""
    run_folder.check_whole(out, CLAIM, (SHARD,), "--out")


def check_claim(plan: SamplePlan) -> None:
    """Refuse a folder that holds other samples."""
    mine, theirs = identity(plan), json.loads(plan.out.get(CLAIM))
    if mine["checkpoint_digest"] != theirs.get("checkpoint_digest") and _asked_alike(plan, theirs):
        raise TryAgainError(
            f"another job has just begun in {plan.out.url}, with another network for {plan.asked.address}; run the "
            "same command again to go on with that"
        )
    for name in mine:
        if mine[name] != theirs.get(name, LATER.get(name)):
            one, other = _differing(theirs.get(name), mine[name])
            raise ConfigurationError(
                f"{plan.out.url} holds other samples: their {name} is {one}, this job's is {other}; "
                "give another --out, or delete that folder"
            )


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two settings that have parts, return the parts that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in one | other if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def _asked_alike(plan: SamplePlan, theirs: dict[str, Any]) -> bool:
    return networks.is_address(plan.asked.address) and theirs.get("asked", {}).get("address") == plan.asked.address
