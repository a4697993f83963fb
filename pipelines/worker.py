"""What runs on a worker of Ray Train: the loop, and what listens to it there.

The *controller* of Ray Train opens the stream, anew at each start of the workers, at the position of the newest valid
checkpoint. The *workers* load that checkpoint and run :func:`pipelines.fit.fit`. What they have to say travels through
a bounded queue to the driver, which alone speaks to the tracker: so no tracker can hold a worker up.
"""

import math
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import ray
import ray.train
import torch
from ray.train.torch import get_device
from ray.util.queue import Queue
from torch import Tensor

from models.network import build
from models.parallelize import construct
from models.samplers import sample_noise
from pipelines import checkpoints, metrics
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.config import TrainJob
from pipelines.errors import BrickyardError, TryAgainError
from pipelines.fit import GRID, DivergedError, Listener, State, fit, new_state
from pipelines.foreman import Notice, leave
from pipelines.images import View
from pipelines.kept import kept
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.record import (
    Committed,
    Hanging,
    Left,
    Message,
    NotCommitted,
    Picture,
    Report,
    Started,
    Used,
    Warned,
    send,
)
from pipelines.saver import Saved, Saver
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream
from pipelines.usage import Usage
from pipelines.watch import Watch
from pipelines.world import World


@dataclass(frozen=True)
class TrainTask:
    """All that the controller and the workers need, as one object."""

    job: TrainJob
    data: Folder
    manifest: Manifest
    about: Checkpoint
    wire: Queue

    @property
    def view(self) -> View:
        return self.job.data.view(self.manifest.side, self.manifest.channels)

    def deal(self, position: int) -> Deal:
        fit_config, image_bytes = self.job.fit, math.prod(self.view.shape)
        return Deal(
            start=position,
            stop=fit_config.images,
            batch_images=fit_config.batch_images,
            micro_images=fit_config.micro_images,
            window_batches=window_batches(self.job.data.window_bytes, self.manifest.row_bytes, fit_config.batch_images),
            image_bytes=image_bytes,
        )

    def open(self) -> ray.data.Dataset:
        """Open the stream where the newest valid checkpoint is. Called by the controller at each start."""
        position = checkpoints.choose(self.job.run, self.warn)
        return open_stream(self.read_from(position), self.job.data.wanted_labels)

    def warn(self, text: str, position: int = 0) -> None:
        """Say something to the user, whom no log of another process reaches."""
        send(self.wire, Warned(position, text))

    def read_from(self, position: int) -> ReadWindow:
        """Return the read task of the stream from a position on."""
        deal, config = self.deal(position), self.job.data
        rows = deal.window_batches * deal.batch_images
        return ReadWindow(
            folder=kept(self.data, self.manifest.digest, config.keep_gb),
            manifest=self.manifest,
            plan=Plan(self.job.seed, self.manifest.rows, self.manifest.row_group_rows, rows, config.held_out),
            deal=deal,
            view=self.view,
            random_crop=config.crop == "random",
            max_bad_share=config.ingest.max_bad_share,
            quarantine=self.job.run / "quarantine",
        )


class WorkerListener(Listener):
    """Takes what the loop says, on a worker. (all ranks)"""

    def __init__(self, task: TrainTask, world: World, start: int, usage: Usage | None) -> None:
        """Begin to listen.

        Args:
            task: what the worker does.
            world: its place.
            start: the position that it starts at.
            usage: of its node, if this is the one worker there that tells.
        """
        self.task, self.world, self._usage = task, world, usage
        self._position, self._notice = start, Notice(world)
        self._watch = Watch(task.job.scaling.hang_s, self._hanging)
        # Here, where all ranks meet, and not when it is first due: then nobody watches.
        self.saver = Saver(task.job.run, task.about, world, task.job.keep_checkpoints, self._say_saved)

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.send(Report(position, metrics))

    def picture(self, pixels: Tensor, position: int) -> None:
        self.send(Picture(position, pixels.cpu()))

    def notice(self) -> bool:
        """Whether the workers must leave; the same on all ranks, once a step."""
        job = self.task.job
        self._position += job.fit.batch_images
        self._watch.step()
        if self.world.rank == 0:
            metrics.IMAGES.add(job.name, job.fit.batch_images)
        if self._usage and self._position % job.fit.log_images == 0:
            self.send(Used(self._position, self._usage.look()))
        return self._notice()

    def leave(self, state: State) -> NoReturn:
        """Go, to be started again from the newest checkpoint, which is this state if storage took it."""
        self.settle()
        self._watch.step()
        if self.world.rank == 0:
            self.send(Left(state.position, self._notice.why))
        self.world.sum(torch.zeros(1, device=self.world.device))  # when one is gone, Ray Train ends the others
        self._watch.pause()
        leave()

    def _hanging(self, stacks: str) -> None:
        self.send(Hanging(self._position, self.world.rank, self.task.job.scaling.hang_s, stacks))

    def warn(self, text: str, position: int) -> None:
        self.task.warn(text, position)

    def at_work(self) -> None:
        self._watch.step()

    def flush(self) -> None:
        self._watch.pause()
        self.saver.flush()

    def settle(self) -> None:
        """Flush; if storage does not take the last checkpoint, which is said, there is one before it."""
        with suppress(TryAgainError):
            self.flush()

    def checkpoint(self, state: State) -> None:
        self._watch.pause()
        self.saver.save(state)
        self._watch.step()

    def _say_saved(self, saved: Saved) -> None:
        if saved.failure:
            self.send(NotCommitted(saved.position, saved.failure))
        else:
            self.send(Committed(saved.position, saved.seconds, saved.waited_s, saved.copied_s))

    def send(self, message: Message) -> None:
        send(self.task.wire, message)


def train_worker(task: TrainTask) -> None:
    """Run the loop on a worker of Ray Train, and say what the matter is if it fails. (all ranks)"""
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    try:
        _train(task, world)
    except (BrickyardError, ray.exceptions.RayActorError):  # ours, which speak for themselves, and those who leave
        raise
    except Exception:
        task.warn(f"worker {world.rank} of {world.size} fails:\n{traceback.format_exc()}")
        raise


def _train(task: TrainTask, world: World) -> None:
    job = task.job
    torch.set_num_threads(job.scaling.threads_per_worker)
    side, _, channels = task.view.shape
    # Weights: 1. a function of the seed …
    model, parallel = construct(
        lambda: build(job.network, channels, side, len(task.manifest.labels)), job.seed, job.parallel, world.device
    )
    schedule = job.schedule.tables()
    state = new_state(model, job.fit, schedule, parallel)
    if found := checkpoints.chosen(job.run):
        checkpoints.load(*found, state)  # … 2. or of the newest checkpoint
    usage = Usage() if ray.train.get_context().get_local_rank() == 0 else None
    listener = WorkerListener(task, world, state.position, usage)
    if world.rank == 0:
        listener.send(Started(state.position, world.size))
        if state.position == 0:
            x_T, _ = sample_noise(torch.arange(GRID), (channels, side, side))  # what the first samples are made of
            listener.picture(x_T, 0)
    stream = batches(ray.train.get_dataset_shard("train"), task.deal(state.position), world.rank, world.size)
    try:
        fit(job.fit, state, schedule, job.seed, stream, listener, world)
    except DivergedError:  # on all ranks at once
        listener.settle()  # what it can be gone on from
        raise
