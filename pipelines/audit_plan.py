"""What an audit compares with what, and what is on record about it."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import checkpoints
from pipelines.audit_config import AuditJob
from pipelines.audit_search import DataReader
from pipelines.errors import ConfigurationError, DataError
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import held_out_rows
from pipelines.sample_set import SampleSet
from pipelines.storage import Folder

log = logging.getLogger("brickyard.audit")


@dataclass(frozen=True)
class Control:
    """Pictures that are judged as the samples are."""

    kind: str
    """``held out``, ``left out`` or ``none``."""
    row: NDArray[np.int64]
    """[n], rising."""
    own: NDArray[np.int64]
    """[n]: the row itself where it is among the training images, and -1 where it is not."""


@dataclass(frozen=True)
class AuditPlan:
    """What is compared, and how."""

    job: AuditJob
    samples: SampleSet
    data: DataReader
    k: int
    mirrored: bool
    held: NDArray[np.int64]
    """Rows that the network was not trained on, rising."""
    control: Control
    notes: list[str]
    """What a reader of the report must know."""
    labels: list[str]

    @property
    def out(self) -> Folder:
        return Folder(self.job.out) if self.job.out else self.samples.folder

    @property
    def terms(self) -> dict[str, Any]:
        """All that the outcome is a function of."""
        return {
            "samples_digest": self.samples.digest,
            "reference_digest": self.data.manifest.digest,
            "features": self.job.features.identity,
            "neighbours": self.k,
            "threshold": self.job.threshold,
            "mirrored": self.mirrored,
            "held_out": len(self.held),
            "control": self.control.kind,
            "control_images": len(self.control.row),
            "pairs": self.job.pairs,
        }


def plan_audit(job: AuditJob) -> AuditPlan:
    """Find samples and data, and what is on record about them.

    Raises:
        DataError: if either is not there or not finished, or if the two cannot be compared.
        ConfigurationError: if it is not on record what the network was trained on.
    """
    samples = SampleSet.find(Folder(job.samples))
    lineage = samples.lineage
    if not job.reference and not lineage.get("data_url"):
        raise ConfigurationError(
            "reference is empty, and it is not on record what the network was trained on: give --reference FOLDER of a "
            "data set"
        )
    folder = Folder(job.reference or lineage["data_url"])
    manifest = Manifest.load(folder)
    height, _, channels = samples.shape
    if manifest.channels != channels or 0 < manifest.side < height:
        raise DataError(
            f"samples are {height} x {height} x {channels}, the images of {folder.url} are "
            f"{' x '.join(map(str, manifest.shape))}; they cannot be compared"
        )
    job.features.check_shape(samples.shape)
    same_data = manifest.digest == lineage.get("data_digest")
    if not job.reference and not same_data:
        raise DataError(
            f"{folder.url} is not what it was when the network was trained on it: its digest is "
            f"{manifest.digest[:16]}…, not {str(lineage.get('data_digest'))[:16]}…; give --reference {folder.url} if "
            "it is to be compared with nevertheless"
        )
    config, notes = _on_record(lineage)
    mirrored = bool(config.get("fit", {}).get("flip")) if job.mirrored == "as-trained" else job.mirrored == "yes"
    held_out = job.held_out if job.held_out >= 0 else config.get("data", {}).get("held_out", 0) if same_data else 0
    if not same_data:
        notes.append("the data set is not the one that the network was trained on")
    if config.get("data", {}).get("crop") == "random":
        notes.append("training cut the images at random places; they are compared as cut in the middle")
    rows = manifest.rows - held_out
    if rows < 3:
        raise DataError(f"{folder.url} has {manifest.rows} images, {held_out} of them held out; three must be left")
    held = held_out_rows(manifest.rows, held_out)
    view = View(side=height, channels=manifest.channels, zoom=lineage.get("zoom", 1.0))
    return AuditPlan(
        job, samples, DataReader(folder, manifest, view), min(job.neighbours, rows - 1), mirrored, held,
        _control(manifest.rows, held, job.control_images), notes, manifest.labels if same_data else [],
    )  # fmt: skip


def _on_record(lineage: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of the run that trained the network, and what is to be said if it is not there."""
    try:
        checkpoint = checkpoints.read(Folder(lineage["checkpoint"]))
        if checkpoint.digest == lineage["checkpoint_digest"]:
            return checkpoint.config, []
        reason = "there is another one"
    except (DataError, ConfigurationError) as error:
        reason = str(error)
    note = (
        "the checkpoint is not there any more, so it is not known whether images were held out or shown mirrored; "
        "--held-out and --mirrored say so"
    )
    log.warning("%s (%s)", note, reason)
    return {}, [note]


def _control(rows: int, held: NDArray[np.int64], most: int) -> Control:
    if not most:
        return Control("none", np.empty(0, np.int64), np.empty(0, np.int64))
    if len(held):
        chosen = held[held_out_rows(len(held), min(most, len(held)))]
        return Control("held out", chosen, np.full(len(chosen), -1))
    # Any training image is as far from the others as a new picture is from all of them, if they were drawn alike.
    chosen = held_out_rows(rows, min(most, rows))
    return Control("left out", chosen, chosen)
