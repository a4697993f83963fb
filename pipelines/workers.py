"""Ray Train binds itself to the loop.

The *controller* of Ray Train opens the stream, anew at each start of the workers, at the position of the newest valid
checkpoint. The *workers* load that checkpoint and run :func:`pipelines.fit.fit`. What rank 0 has to say travels
through a bounded queue to the driver, which alone speaks to the tracker: so no tracker can hold a worker up.
How workers leave before the end is in :mod:`pipelines.foreman`.
"""

import functools
import logging
import math
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import ray
import ray.train
import torch
from ray.train import DataConfig as RayDataConfig
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import get_device
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from models.network import build
from models.parallelize import construct
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.cluster import check_node_labels
from pipelines.config import TrainJob
from pipelines.errors import BrickyardError, TryAgainError, root
from pipelines.fit import DivergedError, Listener, State, fit, new_state
from pipelines.foreman import OUTSIDE, WAITING_S, Foreman, NotAgain, Notice, Trainer, leave
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.record import (
    MAX_WAITING,
    Committed,
    Hanging,
    Left,
    Message,
    NotCommitted,
    Picture,
    Record,
    Report,
    Started,
    Warned,
    send,
)
from pipelines.saver import Saved, Saver
from pipelines.scaling import ScalingConfig
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, execution_options, open_stream
from pipelines.tracking import Tracker
from pipelines.watch import Watch
from pipelines.world import World

HEALTH_MARGIN_S = 60.0
"""Beyond scaling.hang_s, after which Ray Train gives a worker up that does not answer."""

log = logging.getLogger("brickyard.train")


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
            folder=self.data,
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

    def __init__(self, task: TrainTask, world: World, start: int) -> None:
        self.task, self.world = task, world
        self._position, self._notice = start, Notice(world)
        self._watch = Watch(task.job.scaling.hang_s, self._hanging)

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.send(Report(position, metrics))

    def picture(self, pixels: Tensor, position: int) -> None:
        self.send(Picture(position, pixels.cpu()))

    def notice(self) -> bool:
        """Whether the workers must leave; the same on all ranks, once a step."""
        self._position += self.task.job.fit.batch_images
        self._watch.step()
        return self._notice()

    def leave(self, state: State) -> NoReturn:
        """Go, to be started again from the newest checkpoint, which is this state if storage took it."""
        self.settle()
        if self.world.rank == 0:
            self.send(Left(state.position, self._notice.why))
        self.world.sum(torch.zeros(1, device=self.world.device))  # when one is gone, Ray Train ends the others
        leave()

    def _hanging(self, stacks: str) -> None:
        self.send(Hanging(self._position, self.world.rank, self.task.job.scaling.hang_s, stacks))

    def warn(self, text: str, position: int) -> None:
        self.task.warn(text, position)

    def pause(self) -> None:
        self._watch.pause()

    def flush(self) -> None:
        self.pause()
        self.saver.flush()

    def settle(self) -> None:
        """Flush; if storage does not take the last checkpoint, which is said, there is one before it."""
        with suppress(TryAgainError):
            self.flush()

    def checkpoint(self, state: State) -> None:
        self.pause()
        self.saver.save(state)
        self._watch.step()

    @cached_property
    def saver(self) -> Saver:
        """Made by all ranks together, when the first checkpoint is due."""
        job = self.task.job
        return Saver(job.run, self.task.about, self.world, job.keep_checkpoints, self._say_saved)

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
    listener = WorkerListener(task, world, state.position)
    if world.rank == 0:
        listener.send(Started(state.position, world.size))
    stream = batches(ray.train.get_dataset_shard("train"), task.deal(state.position), world.rank, world.size)
    try:
        fit(job.fit, state, schedule, job.seed, stream, listener, world)
    except DivergedError:  # on all ranks at once
        listener.settle()  # what it can be gone on from
        raise


def run_workers(
    job: TrainJob,
    data: Folder,
    manifest: Manifest,
    about: Checkpoint,
    tracker: Tracker,
    on_commit: Callable[[int], None],
) -> dict[str, float]:
    """Run the loop on the job's workers, to the end of the run; return its last report and ``trained_images``.

    ``on_commit`` is told the position of each checkpoint, in another thread.

    Raises:
        DivergedError: if the gradient is not finite.
        TryAgainError: if workers failed more often than allowed, or something outside did.
        DataError: if data or storage cannot be used.
    """
    check_node_labels(job.data.wanted_labels)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    wire = Queue(MAX_WAITING, actor_options={"num_cpus": 0, "scheduling_strategy": here})  # other nodes may go
    record = Record(wire, tracker, job.fit.images, on_commit)
    try:
        _run_ray_train(job, TrainTask(job, data, manifest, about, wire))
    finally:
        record.close()
        wire.shutdown()
    return {"trained_images": job.fit.images - (record.started_at or 0), **record.last}


def _run_ray_train(job: TrainJob, task: TrainTask) -> None:
    scaling = job.scaling
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    no_room = (
        f"there has been no room for the workers for {WAITING_S:.0f} s: {scaling.min_workers or scaling.workers} with "
        f"{resources} each; `ray status` says what the cluster has"
    )
    # What Ray Train keeps of its own is empty, since nothing is reported to it, and its controller runs on this node.
    # So it lies here, out of reach of what befalls the run's storage, and each start has a folder of its own.
    own = tempfile.TemporaryDirectory(prefix="brickyard-ray-", ignore_cleanup_errors=True)
    trainer = Trainer(
        functools.partial(train_worker, task),
        scaling_config=RayScalingConfig(
            num_workers=(scaling.min_workers, scaling.workers) if scaling.min_workers else scaling.workers,
            elastic_resize_monitor_interval_s=scaling.resize_s,
            use_gpu=scaling.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=Path(own.name).name,
            storage_path=own.name,
            failure_config=FailureConfig(max_failures=-1),  # NotAgain counts
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[
                Foreman(functools.partial(task.warn, no_room)),
                NotAgain(scaling.max_failures, functools.partial(checkpoints.chosen_position, job.run)),
            ],
        ),
        datasets={"train": task.open},
        dataset_config=RayDataConfig(execution_options=execution_options(), enable_shard_locality=False),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _ray_trains_times(scaling):
            trainer.fit()
    except SystemExit as error:  # Ray Train's answer to Ctrl-C, with the exit code 0
        raise KeyboardInterrupt from error
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:  # the latter: its controller is gone
        behind = root(getattr(error, "controller_failure", error))
        if isinstance(behind, OUTSIDE):
            raise TryAgainError(
                f"training stopped: {behind}; run the same command to go on from the newest checkpoint"
            ) from error
        raise behind from error
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own behind
        own.cleanup()


@contextmanager
def _ray_trains_times(scaling: ScalingConfig) -> Iterator[None]:
    """Set how long Ray Train waits, which it reads from the environment of the driver."""
    # For a process that does not even answer: later than its peers, who wait for it and then say where.
    times = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(scaling.hang_s + HEALTH_MARGIN_S)}
    if scaling.min_workers:  # a node may have died that Ray still counts on: find out soon how many are left
        times["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"
    mine = {name: value for name, value in times.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]
