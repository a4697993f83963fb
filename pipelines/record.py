"""What rank 0 has to say, on its way to the tracker, to Prometheus and to the terminal.

It travels through a bounded queue to the driver, which alone speaks to the tracker: no tracker can hold a worker up.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import ray
from ray.util.queue import Empty, Full, Queue
from torch import Tensor

from pipelines import metrics as seen
from pipelines.fit import x_0_to_pixels
from pipelines.pictures import contact_sheet
from pipelines.progress import TrainingProgress
from pipelines.tracking import Tracker

MAX_WAITING = 1000
"""Messages that wait for the driver; further ones are dropped, training goes on."""

log = logging.getLogger("brickyard.train")


@dataclass(frozen=True)
class Report:
    """Metrics of the loop at a position."""

    position: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Used:
    """What a node was used for until a position."""

    position: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Picture:
    """Sample images of the loop at a position, float [n, C, H, W]."""

    position: int
    samples: Tensor


@dataclass(frozen=True)
class Committed:
    """A checkpoint was committed."""

    position: int
    seconds: float
    waited_s: float = 0.0
    """For how long training stood still because the one before was still on its way."""
    copied_s: float = 0.0
    """And while its state was copied."""


@dataclass(frozen=True)
class NotCommitted:
    """Storage did not take a checkpoint; training goes on."""

    position: int
    reason: str


@dataclass(frozen=True)
class Started:
    """The workers have started, at a position."""

    position: int
    workers: int


@dataclass(frozen=True)
class Left:
    """The workers have left of themselves at a position."""

    position: int
    reason: str


@dataclass(frozen=True)
class Hanging:
    """A worker has waited for too long after a position, and ends itself."""

    position: int
    rank: int
    seconds: float
    stacks: str


@dataclass(frozen=True)
class Warned:
    """Something that the user should know of, at or after a position, from where no log of ours is read."""

    position: int
    text: str


Message: TypeAlias = Report | Used | Picture | Committed | NotCommitted | Started | Left | Hanging | Warned


def send(wire: Queue, message: Message) -> None:
    """Hand a message to the driver, or drop it: the record never holds training up."""
    try:
        wire.put_nowait(message)
    except (Full, ray.exceptions.RayActorError) as error:
        log.warning("%s at %d is lost to the record: %s", type(message).__name__, message.position, error)


class Record:
    """Moves messages from the workers to the tracker, to Prometheus and to the terminal, in a thread of the driver, and
    says the positions of checkpoints to whom it may concern."""

    def __init__(self, wire: Queue, tracker: Tracker, name: str, images: int, on_commit: Callable[[int], None]) -> None:
        self.last: dict[str, float] = {}
        self.started_at: int | None = None
        """Where the first workers began, in images; None: none have."""
        self._wire, self._tracker, self._name, self._on_commit = wire, tracker, name, on_commit
        self._progress = TrainingProgress(images)
        self._starts = 0
        self._closing = threading.Event()
        seen.LENGTH.set(name, images)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                message = self._wire.get(timeout=0.5)
            except Empty:
                if self._closing.is_set():
                    return
                continue
            except ray.exceptions.RayError:
                return
            try:
                self._take(message)
            except Exception:  # one message is worth a word, not the record
                log.exception("a message of the workers is not on record: %s", type(message).__name__)

    def _take(self, message: Message) -> None:
        match message:
            case Report(position, metrics):
                self.last |= {"loss": metrics["loss"], "images_per_s": round(metrics["images_per_s"], 1)}
                for name in ("images_replaced", "storage_retries", "steps_skipped"):
                    self.last[name] = self.last.get(name, 0) + metrics[name]
                seen.POSITION.set(self._name, position)
                seen.RATE.set(self._name, metrics["images_per_s"])
                seen.DATA_WAIT.set(self._name, metrics["data_wait_percent"] / 100)
                seen.QUARANTINED.add(self._name, metrics["images_replaced"])
                seen.STORAGE_RETRIES.add(self._name, metrics["storage_retries"])
                self._progress.update(position, metrics)
                self._tracker.metrics(metrics, position)
            case Used(position, metrics):
                self._tracker.metrics(metrics, position)
            case Picture(position, samples):
                self._tracker.picture(contact_sheet(x_0_to_pixels(samples).numpy()), "samples", position)
                log.info("samples at %d images", position)
            case Committed(position, seconds, waited_s, copied_s):
                log.info("checkpoint at %d images, %.2f s", position, seconds)
                seen.CHECKPOINT.set(self._name, time.time())
                seen.CHECKPOINT_TOOK.set(self._name, seconds)
                seen.CHECKPOINT_STALL.add(self._name, waited_s + copied_s)
                if waited_s > 1:
                    log.warning(
                        "training stood still for %.1f s until storage had taken the checkpoint before that at %d "
                        "images; raise fit.checkpoint_images", waited_s, position,
                    )  # fmt: skip
                timings = {"checkpoint_s": seconds, "checkpoint_wait_s": waited_s, "checkpoint_copy_s": copied_s}
                self._tracker.metrics(timings, position)
                self._on_commit(position)
            case NotCommitted(position, reason):
                log.warning(
                    "there is no checkpoint at %d images: %s. Training goes on; it stops if the next one fails too",
                    position, reason,
                )  # fmt: skip
            case Left(position, reason):
                log.info("the workers leave at %d images: %s", position, reason)
            case Hanging(position, rank, seconds, stacks):
                log.error(
                    "worker %d has made no step for %g s after %d images, and is given up; a worker that says nothing "
                    "is the one that the others wait for; its threads:\n%s", rank, seconds, position, stacks,
                )  # fmt: skip
            case Started(position, workers):
                log.info("%d workers train from %d images on", workers, position)
                self._starts += 1
                seen.POSITION.set(self._name, position)
                seen.WORKER_STARTS.add(self._name, 1)
                self._tracker.tags({"brickyard.workers": str(workers), "brickyard.worker_starts": str(self._starts)})
                if self.started_at is None:
                    self.started_at = position
            case Warned(_, text):
                log.warning("%s", text)

    def close(self) -> None:
        """Pass on what still waits, for ten seconds at most."""
        self._closing.set()
        self._thread.join(timeout=10)
        if self._thread.is_alive():
            log.warning("the tracker is slow: what still waited for it is not on record")
        self._progress.close()
