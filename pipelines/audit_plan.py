"""What an audit compares with what, and what is on record about it."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import champion, checkpoints, exports
from pipelines.audit_config import AuditJob
from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.manifest import Manifest
from pipelines.picture_sets import DataPictures, SamplePictures, as_seen
from pipelines.plan import held_out_rows
from pipelines.sample_set import MANIFEST, SampleSet
from pipelines.storage import Folder

LINEAGE = {"checkpoint": str, "checkpoint_digest": str, "position": int}
"""What the lineage of samples must say, to be audited."""
JUDGED_BY = ("neighbours", "threshold", "held_out", "control_images", "mirrored")
"""Settings that the shares depend on."""

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
    data: DataPictures
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
            "samples_digest": SamplePictures(self.samples).digest,  # of the pictures, as scores have it
            "reference_digest": self.data.digest,
            "features": self.job.features.identity,
            "neighbours": self.k,
            "threshold": self.job.threshold,
            "mirrored": self.mirrored,
            "held_out": len(self.held),
            "control": self.control.kind,
            "control_images": len(self.control.row),
            "pairs": self.job.pairs,
        }

    @property
    def suffix(self) -> str:
        """What the names of the outcome have behind them on record: as those of scores, and settings that are not the
        usual ones."""
        usual, job = AuditJob(samples=self.job.samples), self.job
        unusual = [name for name in JUDGED_BY if getattr(job, name) != getattr(usual, name)]
        behind = champion.suffix(job.features, self.data.digest, self.samples.lineage)
        return behind + "".join(f"_{name}_{getattr(job, name)}" for name in unusual)


def plan_audit(job: AuditJob) -> AuditPlan:
    """Find samples and data, and what is on record about them.

    Raises:
        DataError: if either is not there or not finished, or if the two cannot be compared.
        ConfigurationError: if it is not on record what the network was trained on, or if the file of the features is
            not the one that was named.
    """
    samples = SampleSet.find(Folder(job.samples))
    lineage = samples.lineage
    for name, kind in LINEAGE.items():
        if not isinstance(lineage.get(name), kind):
            raise DataError(
                f"{samples.folder.url}/{MANIFEST} does not say what network the samples are of: the {name} of their "
                f"lineage is {lineage.get(name)!r}"
            )
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
    if job.features.kind == "file":
        from pipelines.file_features import check_digest

        check_digest(job.features)  # before a cluster is started for it
    same_data = manifest.digest == lineage.get("data_digest")
    if not job.reference and not same_data:
        raise DataError(
            f"{folder.url} is not what it was when the network was trained on it: its digest is "
            f"{manifest.digest[:16]}…, not {str(lineage.get('data_digest'))[:16]}…; give --reference {folder.url} if "
            "it is to be compared with nevertheless"
        )
    known, notes = _on_record(lineage)
    mirrored = bool(known.flip) if job.mirrored == "as-trained" else job.mirrored == "yes"
    held_out = job.held_out if job.held_out >= 0 else (known.held_out or 0) if same_data else 0
    if job.held_out < 0 and same_data and known.held_out is None:
        notes.append("it is not known whether images were held out; none is taken for that: --held-out says how many")
    if job.mirrored == "as-trained" and known.flip is None:
        notes.append("it is not known whether the network was shown mirror images; they do not count: --mirrored yes")
    if not same_data:
        notes.append("the data set is not the one that the network was trained on")
    if known.crop == "random":
        notes.append("training cut the images at random places; they are compared as cut in the middle")
    if known.crop is None:
        notes.append("it is not known whether training cut the images at random places; they are cut in the middle")
    rows = manifest.rows - held_out
    if rows < 3:
        raise DataError(f"{folder.url} has {manifest.rows} images, {held_out} of them held out; three must be left")
    held = held_out_rows(manifest.rows, held_out)
    pictures = SamplePictures(samples)
    labels = manifest.labels if pictures.labels_unsaid and same_data else pictures.labels
    return AuditPlan(
        job, samples, as_seen(folder, manifest, height, lineage.get("zoom", 1.0)), min(job.neighbours, rows - 1),
        mirrored, held, _control(manifest.rows, held, job.control_images), notes, labels,
    )  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What is on record of how the network was trained; None if it is not."""

    held_out: int | None = None
    flip: bool | None = None
    crop: str | None = None


def _on_record(lineage: dict[str, Any]) -> tuple[Known, list[str]]:
    """Return what the network's own record says of its training, and what is to be said if that is not there."""
    folder = Folder(lineage["checkpoint"])
    try:
        # No weights are read for it: they may be large, and nothing is loaded.
        if folder.exists(checkpoints.MANIFEST):
            checkpoint = checkpoints.read(folder)
            digest = checkpoint.digest
        elif export := exports.read(folder):
            checkpoint, digest = export
        else:
            raise DamagedError(f"{folder.url} holds no checkpoint of ours any more")
        if digest == lineage["checkpoint_digest"]:
            return _known(checkpoint.config), []
        note = f"what is at {folder.url} is another network than the one that drew the samples"
    except (DataError, ConfigurationError) as error:
        note = f"the record of the network cannot be read: {error}"
    log.warning("%s", note)
    return Known(), [note]


def _known(config: dict[str, Any]) -> Known:
    data, fit = (found if isinstance(found := config.get(name), dict) else {} for name in ("data", "fit"))
    held_out = data.get("held_out")
    return Known(held_out if isinstance(held_out, int) else None, fit.get("flip"), data.get("crop"))


def _control(rows: int, held: NDArray[np.int64], most: int) -> Control:
    if not most:
        return Control("none", np.empty(0, np.int64), np.empty(0, np.int64))
    if len(held):
        chosen = held[held_out_rows(len(held), min(most, len(held)))]
        return Control("held out", chosen, np.full(len(chosen), -1))
    # Any training image is as far from the others as a new picture is from all of them, if they were drawn alike.
    chosen = held_out_rows(rows, min(most, rows))
    return Control("left out", chosen, chosen)
