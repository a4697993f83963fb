"""The loss on images that nothing was learned from, of each checkpoint, measured beside training.

It is a function of (checkpoint, data): the rows that are held out, and the t and the ε of each, are the same in every
run on a data set, whatever its seed and its workers, so that runs can be compared point by point. So it needs nothing
of the loop: the driver hears of a checkpoint and sends a Ray task off to it.

Ray Train 2.60 has the same offer, in alpha: a ``ValidationConfig``, and ``report(checkpoint=…, validation=True)``. It
ends in a Ray task like this one, one at a time. But it is for checkpoints that Ray Train was given, by a ``report``
that all workers wait in, and ours are committed by a manifest of their own; it keeps the result with its checkpoints,
where the driver sees it when training is over; what waits is done oldest first, all of it before the job may end; and
what was left undone by a crash it knows of no more in the new folder that each of our starts has.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.objective import EpsTheta, reduced_loss
from models.philox import stream_key
from models.schedule import Schedule
from pipelines import checkpoints
from pipelines.config import TrainJob
from pipelines.fit import BANDS, band_of, by_band, noise_like, pixels_to_x_0
from pipelines.images import Pixels, View
from pipelines.lineage import Trained
from pipelines.manifest import Manifest
from pipelines.permutation import permute
from pipelines.plan import held_out_rows
from pipelines.storage import Folder
from pipelines.tracking import Tracker

METRIC = "validation_loss"
BATCH_IMAGES = 64
"""Images that are read, and computed, at once."""
LAST_S = 1800.0
"""How long the end of a job waits for the loss of its last checkpoint."""
LOOK_S = 0.5
"""Between two looks whether what is being measured is wanted still."""
SEED = 0
"""Of t and ε, in all runs."""

log = logging.getLogger("brickyard.train")


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images that nothing was learned from."""

    count: int
    """How many were held out, the unusable among them."""
    index: NDArray[np.int64]
    """[n], rising: the number of each usable one, by which its t and its ε are drawn."""
    label: NDArray[np.int64]
    """[n], an index into the manifest's labels, or -1."""
    image: Pixels
    """uint8 [n, H, W, C]."""


def read_held_out(folder: Folder, manifest: Manifest, count: int, view: View) -> HeldOut:
    """Read the images of a data set that are held out, a few at a time; each is cut in the middle.

    Raises:
        DataError: if the data set cannot be read.
    """
    parts = []
    for index in np.split(np.arange(count), range(BATCH_IMAGES, count, BATCH_IMAGES)):
        rows = held_out_rows(manifest.rows, count)[index]
        found = manifest.read(folder, rows, view)
        usable = found.row == rows  # what would stand in for the others was learned from
        parts.append((index[usable], found.label[usable], found.image[usable]))
    return HeldOut(count, *(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def timesteps(index: Tensor, count: int, T: int) -> Tensor:
    """Return t in 1..T for each number (int64 [n]) among ``count`` images: together they cover 1..T evenly."""
    stratum: Tensor = permute(index, count, stream_key(SEED, "validation t"))
    return 1 + (2 * stratum + 1) * T // (2 * count)  # the middle of the stratum


@torch.no_grad()
def losses(
    told: Callable[[Tensor], EpsTheta], schedule: Schedule, held: HeldOut, batch_images: int = BATCH_IMAGES
) -> tuple[Tensor, Tensor]:
    """Return t (int64 [n]) and ‖ε - ε̂‖², the reduced loss, of each image (float64 [n]), on the CPU.

    Args:
        told: ε̂ for pictures of the given labels, int64 [b].
        schedule: the whole one, on the device to compute on.
        held: the images.
        batch_images: how many are computed at once, which changes nothing but the rounding.
    """
    device, parts = schedule.alpha.device, []
    for start in range(0, len(held.index), batch_images):
        batch = slice(start, start + batch_images)
        columns = held.index, held.label, held.image
        index, label, image = (torch.tensor(values[batch], device=device) for values in columns)
        x_0, t = pixels_to_x_0(image), timesteps(index, held.count, schedule.steps)
        eps = noise_like(x_0, SEED, index, "validation eps")
        parts.append((t.cpu(), reduced_loss(told(label), x_0, t, eps, schedule).double().cpu()))
    t_parts, loss_parts = zip(*parts, strict=True)
    return torch.cat(t_parts), torch.cat(loss_parts)


def in_bands(t: Tensor, loss: Tensor, T: int) -> dict[str, float]:
    """Return the mean of the losses, and of each band of t that has any, by the names that they are recorded under."""
    counted = torch.stack([loss, torch.ones_like(loss)])
    return by_band(loss.new_zeros(2, BANDS).index_add_(1, band_of(t, T), counted), METRIC)


@dataclass(frozen=True, eq=False)
class Curve:
    """The loss of a checkpoint's averaged weights over t, in units of ε whatever its target."""

    position: int
    T: int
    t: Tensor
    """int64 [n], of each image that was held out."""
    loss: Tensor
    """float64 [n]."""

    @property
    def means(self) -> dict[str, float]:
        """The mean, and that of each band of t, by the names that they are recorded under."""
        return in_bands(self.t, self.loss, self.T)


def validation_curve(trained: Trained, held: HeldOut, device: torch.device | None = None) -> Curve:
    """Return the loss of a checkpoint on images that are held out.

    Raises:
        DataError: if a file of the checkpoint is missing or is not what was committed.
    """
    device = device or torch.device("cpu")
    network, schedule = trained.network(averaged=True).to(device), trained.schedule().to(device)
    t, loss = losses(lambda label: trained.eps_theta(network, label, 1.0), schedule, held)
    return Curve(trained.checkpoint.position, schedule.steps, t, loss)


def measure(checkpoint: Folder, held: HeldOut, on_gpu: bool) -> Curve:
    """The task: the folder of a checkpoint to its :func:`validation_curve`."""
    os.nice(19)  # of the processors of its node it takes what the others leave
    torch.set_num_threads(1)
    trained = Trained(checkpoint, checkpoints.read(checkpoint))
    return validation_curve(trained, held, torch.device("cuda" if on_gpu else "cpu"))


class Validator:
    """Measures checkpoints beside training, one at a time, and tells the tracker. A context: its end waits for the
    last one, unless it ends in an error. Does nothing where nothing is held out."""

    def __init__(self, job: TrainJob, data: Folder, manifest: Manifest, tracker: Tracker) -> None:
        self.last: Curve | None = None
        """The loss of the newest checkpoint that was taken up; None as long as it is not known."""
        self._job, self._data, self._manifest, self._tracker = job, data, manifest, tracker
        self._due: SimpleQueue[int | None] = SimpleQueue()
        self._given_up = Event()
        self._thread = Thread(target=self._run, name="validation", daemon=True)

    def take(self, position: int) -> None:
        """Have the checkpoint at a position measured. While one is, only the newest of the others waits."""
        if self._job.data.held_out:
            self._due.put(position)

    def __enter__(self) -> "Validator":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._due.put(None)
        try:
            if kind is None:
                self._thread.join(timeout=1)
                if self._thread.is_alive():
                    log.info("waiting for the loss of the images held out, at most %d s", LAST_S)
                self._thread.join(timeout=LAST_S)
        finally:
            self._given_up.set()
            self._thread.join(timeout=10)

    def _run(self) -> None:
        images, done, more = None, -1, True
        while more:
            due = [self._due.get()]
            while not self._due.empty():
                due.append(self._due.get())
            more = due[-1] is not None
            position = max((p for p in due if p is not None), default=done)
            if position > done and not self._given_up.is_set():
                images = images or self._read()
                if self._measure(position, images):
                    done = position
                else:  # it may be committed once more; and it may have been the images that could not be read
                    images = None

    def _read(self) -> Any:
        """Have the images read once for all; they stay in Ray's store, which reads them again if a node is lost."""
        job = self._job
        view, nodes = job.data.view(self._manifest.side, self._manifest.channels), job.data.wanted_labels
        task = ray.remote(num_cpus=0, label_selector=nodes or None)(read_held_out)
        return task.remote(self._data, self._manifest, job.data.held_out, view)

    def _measure(self, position: int, images: Any) -> bool:
        """Measure a checkpoint and record it; return whether that was possible."""
        on_gpu, checkpoint = self._job.scaling.validate_on_gpu, self._job.run / checkpoints.folder_name(position)
        self.last = None
        # No CPU is set aside, or the tasks that read, and so training, would wait for it. The process, which has made
        # itself the last in line for good, is used once.
        task = ray.remote(num_cpus=0, num_gpus=int(on_gpu), max_calls=1)(measure)
        running = task.remote(checkpoint, images, on_gpu)
        # Never cancel it: Ray 2.60 aborts this process if a task is cancelled just after it has finished. A measurement
        # that is given up ends with the job.
        try:
            while not ray.wait([running], timeout=LOOK_S)[0]:
                if self._given_up.is_set():
                    return False
            found = ray.get(running)
        except Exception as error:  # worth a warning, never a run; and only the newest checkpoints are kept
            log.warning("%s at %d images is not on record: %s", METRIC, position, error)
            return False
        self.last = found
        self._tracker.metrics(found.means, position)
        log.info("images held out: a loss of %.4f at %d images", found.means[METRIC], position)
        return True
