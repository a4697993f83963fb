"""A labelled data set to a small classifier, whose features samples can be scored by.

It is trained in this process, in the order of a plan: a function of the data set and the seed, as all that it draws is.
What it leaves is a program of torch.export that maps pictures to features, and a configuration that names it for
jobs/score.py.
"""

import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor

from models.classifier import UNLABELLED, Classifier, ClassifierConfig, Features, classification_loss, right
from models.init import empty, initialize
from pipelines.errors import BrickyardError, ConfigurationError, DataError
from pipelines.features import FeatureConfig
from pipelines.file_features import prepared
from pipelines.images import Pixels, View
from pipelines.lineage import git_revision
from pipelines.manifest import Manifest
from pipelines.plain import to_dict
from pipelines.plan import Plan, held_out_rows, window_batches
from pipelines.storage import Folder

PROGRAM, CONFIG, ABOUT = "features.pt2", "features.yaml", "classifier.json"
WINDOW_BYTES = 64 << 20
"""Images, as they are stored, that are shuffled into each other."""
REPORTS = 10
"""Times that the loss is told."""

log = logging.getLogger("brickyard.classify")


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """Train a small classifier on a labelled data set, for features that scores can go by."""

    data: str
    """The folder of a data set with labels, as jobs/ingest.py makes it."""
    out: str
    """Folder or URL for the program that makes features, its settings and what was measured of it."""
    seed: int = 0
    """Everything that is drawn is a function of this and of positions."""
    side: int = 0
    """Height and width that the pictures are seen at, in pixels; 0: as the data set has them."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    images: int = 25_600
    """Length of the training, in images; a multiple of batch_images."""
    batch_images: int = 64
    """Images behind one step."""
    learning_rate: float = 2e-3
    """Of AdamW, at the start; it comes down to 0 along half a cosine."""
    held_out: int = 256
    """Images that are kept from training, spread evenly over the data set, to measure the accuracy on."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("batch_images", 1), ("held_out", 1), ("side", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.images % self.batch_images:
            near = max(round(self.images / self.batch_images), 1) * self.batch_images
            raise ConfigurationError(
                f"images is {self.images}; it must be a multiple of batch_images, {self.batch_images}: try {near}"
            )
        if not self.learning_rate > 0:
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; it must be positive: try 2e-3")

    def preparation(self, side: int) -> FeatureConfig:
        """Return how pictures of a side are given to the program; what it is and where it lies is not said yet."""
        return FeatureConfig(side=side, low=-1.0, high=1.0, batch_images=self.batch_images)


@dataclass(frozen=True)
class _Plan:
    """What is learned from."""

    job: ClassifyJob
    data: Folder
    manifest: Manifest
    view: View

    @staticmethod
    def find(job: ClassifyJob) -> "_Plan":
        data = Folder(job.data)
        manifest = Manifest.load(data)
        side = job.side or manifest.side
        if not side:
            raise ConfigurationError(f"side is 0, and the pictures of {data.url} have sizes of their own: give --side")
        if 0 < manifest.side < side:
            raise ConfigurationError(f"side is {side}; the pictures of {data.url} have {manifest.side} pixels: less")
        if len(manifest.labels) < 2:
            raise DataError(
                f"{data.url} has {len(manifest.labels)} labels; a classifier needs two or more: ingest files whose "
                "folders are their labels"
            )
        if job.held_out >= manifest.rows:
            raise ConfigurationError(
                f"held_out is {job.held_out}; it must be less than the images of the data set, which are "
                f"{manifest.rows}: try {manifest.rows // 8}"
            )
        return _Plan(job, data, manifest, View(side=side, channels=manifest.channels))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pictures as the network takes them, and labels, in the order of the run."""
        job, manifest = self.job, self.manifest
        size = job.batch_images
        window = size * window_batches(WINDOW_BYTES, max(manifest.row_bytes, math.prod(self.view.shape)), size)
        plan = Plan(job.seed, manifest.rows, manifest.row_group_rows, window, job.held_out)
        for start in range(0, job.images, window):
            rows = plan.rows(start, min(start + window, job.images))
            found = manifest.read(self.data, rows, self.view, barred=plan.held)
            for i in range(0, len(rows), size):
                yield self.given(found.image[i : i + size]), torch.from_numpy(found.label[i : i + size])

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pictures that are kept from training, and labels; what is unusable of them is left out."""
        every = held_out_rows(self.manifest.rows, self.job.held_out)
        for start in range(0, len(every), self.job.batch_images):
            rows = every[start : start + self.job.batch_images]
            found = self.manifest.read(self.data, rows, self.view)
            usable = found.row == rows
            yield self.given(found.image[usable]), torch.from_numpy(found.label[usable])

    def given(self, pixels: Pixels) -> Tensor:
        return prepared(torch.from_numpy(pixels), self.job.preparation(self.view.side))


def train_classifier(plan: _Plan) -> Classifier:
    """Return the network after its training.

    Raises:
        BrickyardError: if the loss is not finite.
    """
    job, (side, _, channels) = plan.job, plan.view.shape
    network = empty(lambda: Classifier(job.classifier, channels, side, len(plan.manifest.labels)))
    initialize(network, job.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=job.learning_rate)
    steps = job.images // job.batch_images
    for step, (x, label) in enumerate(plan.batches()):
        optimizer.param_groups[0]["lr"] = job.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        loss = classification_loss(network, x, label)
        if not loss.isfinite():
            raise BrickyardError(f"the loss is {loss.item()} after {step * job.batch_images} images: lower the rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % max(steps // REPORTS, 1) == 0:
            log.info("classify: %d images, a loss of %.4f", (step + 1) * job.batch_images, loss.item())
    return network.requires_grad_(False).eval()


def accuracy(plan: _Plan, network: Classifier) -> float:
    """Return the share of the images held out that are told right, of those that have a label.

    Raises:
        DataError: if none has.
    """
    told = known = 0
    for x, label in plan.held_out():
        told += right(network, x, label)
        known += int((label != UNLABELLED).sum())
    if not known:
        raise DataError(f"none of the {plan.job.held_out} images of {plan.data.url} that are held out has a label")
    return told / known


def program(network: Classifier, batch_images: int, shape: tuple[int, int, int]) -> bytes:
    """Return the network without its decision as a file of torch.export; the same network makes the same file."""
    side, _, channels = shape
    example = (torch.zeros(max(batch_images, 2), channels, side, side),)
    exported = torch.export.export(Features(network), example, dynamic_shapes=({0: torch.export.Dim("n")},))
    for node in exported.graph.nodes:
        for said in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(said, None)  # where this code lies, which is no part of what it does
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def classify(job: ClassifyJob) -> dict[str, Any]:
    """Train a classifier, and leave its features as a program.

    Raises:
        DataError: if the data set has no labels, or cannot be read.
    """
    torch.set_num_threads(1)  # a sum over threads rounds by their number
    began, plan, out = time.perf_counter(), _Plan.find(job), Folder(job.out)
    log.info("classify: %d images of %s, %d labels", job.images, plan.data.url, len(plan.manifest.labels))
    network = train_classifier(plan)
    content = program(network, job.batch_images, plan.view.shape)
    settings = {
        **{name: to_dict(job.preparation(plan.view.side))[name] for name in ("side", "low", "high", "batch_images")},
        "kind": "file",
        "url": f"{out.url}/{PROGRAM}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "name": "classifier",
    }
    about = {
        "accuracy": accuracy(plan, network),
        "held_out": job.held_out,
        "labels": plan.manifest.labels,
        "data": plan.data.url,
        "data_digest": plan.manifest.digest,
        "features": settings,
        "job": to_dict(job),
        "git_revision": git_revision(),
    }
    out.put(PROGRAM, content)
    out.put(CONFIG, yaml.safe_dump({"features": settings}, sort_keys=False).encode())
    out.put(ABOUT, json.dumps(about, indent=1).encode())
    log.info("classify: %.2f %% of %d images held out are told right", 100 * about["accuracy"], job.held_out)  # type: ignore[operator]
    told = {name: about[name] for name in ("accuracy", "held_out", "features")}
    return told | {"config": f"{out.url}/{CONFIG}", "seconds": round(time.perf_counter() - began, 1)}


def dry_run(job: ClassifyJob) -> dict[str, Any]:
    """Return what would be trained on what, having changed nothing."""
    plan = _Plan.find(job)
    network = empty(lambda: Classifier(job.classifier, plan.view.channels, plan.view.side, len(plan.manifest.labels)))
    return {
        "dry_run": True,
        "images": job.images,
        "steps": job.images // job.batch_images,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "labels": plan.manifest.labels,
        "held_out": job.held_out,
        "out": Folder(job.out).url,
    }
