"""Ray Train binds itself to the loop.

The *controller* of Ray Train opens the stream, anew at each start of the workers, at the position of the newest valid
checkpoint. The *workers* load that checkpoint and run :func:`pipelines.fit.fit`. What rank 0 has to say travels
through a bounded queue to the driver, which alone speaks to the tracker: so no tracker can hold a worker up.
"""

import functools
import logging
import math
import signal
import uuid
from dataclasses import dataclass
from functools import cached_property

import pyarrow.fs
import ray
import ray.train
import torch
from ray.train import DataConfig as RayDataConfig
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Full, Queue
from torch import Tensor

from models.init import empty, initialize
from models.network import build
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.cluster import check_node_labels
from pipelines.config import TrainJob
from pipelines.errors import ConfigurationError, DataError, TryAgainError
from pipelines.fit import DivergedError, State, fit, new_state
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.record import MAX_WAITING, Committed, Diverged, Message, NotCommitted, Picture, Record, Report, Started
from pipelines.saver import Saved, Saver
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, execution_options, open_stream
from pipelines.tracking import Tracker
from pipelines.world import World

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
        deal, config = self.deal(checkpoints.choose(self.job.run)), self.job.data
        rows = deal.window_batches * deal.batch_images
        read = ReadWindow(
            folder=self.data,
            manifest=self.manifest,
            plan=Plan(self.job.seed, self.manifest.rows, self.manifest.row_group_rows, rows),
            deal=deal,
            view=self.view,
            random_crop=config.crop == "random",
            max_bad_share=config.ingest.max_bad_share,
            quarantine=self.job.run / "quarantine",
        )
        return open_stream(read, config.wanted_labels)


@dataclass(frozen=True)
class WorkerListener:
    """Takes what the loop says, on a worker."""

    task: TrainTask
    world: World

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.send(Report(position, metrics))

    def picture(self, pixels: Tensor, position: int) -> None:
        self.send(Picture(position, pixels.cpu()))

    def checkpoint(self, state: State) -> None:
        self.saver.save(state)

    def flush(self) -> None:
        self.saver.flush()

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
        """Hand a message to the driver, or drop it: the record never holds training up."""
        try:
            self.task.wire.put_nowait(message)
        except (Full, ray.exceptions.RayActorError) as error:
            log.warning("%s at %d is lost to the record: %s", type(message).__name__, message.position, error)


def train_worker(task: TrainTask) -> None:
    """Run the loop on a worker of Ray Train. (all ranks)"""
    job = task.job
    torch.set_num_threads(job.scaling.threads_per_worker)
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    side, _, channels = task.view.shape
    model = empty(lambda: build(job.network, channels, side, len(task.manifest.labels)))
    initialize(model, job.seed)  # weights: 1. a function of the seed …
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule = job.schedule.tables()
    state = new_state(model, job.fit, schedule)
    if found := checkpoints.chosen(job.run):
        checkpoints.load(*found, state)  # … 2. or of the newest checkpoint
    listener = WorkerListener(task, world)
    if world.rank == 0:
        listener.send(Started(state.position, world.size))
    stream = batches(ray.train.get_dataset_shard("train"), task.deal(state.position), world.rank, world.size)
    try:
        fit(job.fit, state, schedule, job.seed, stream, listener, world)
        listener.flush()
    except DivergedError as error:  # on all ranks at once: to start again would end the same
        if world.rank == 0:
            task.wire.put(Diverged(state.position, str(error)))
        listener.flush()


def run_workers(
    job: TrainJob, data: Folder, manifest: Manifest, about: Checkpoint, tracker: Tracker
) -> dict[str, float]:
    """Run the loop on the job's workers, to the end of the run; return its last report in short.

    Raises:
        DivergedError: if the gradient is not finite.
        TryAgainError: if workers failed more often than allowed, or something outside did.
        DataError: if data or storage cannot be used.
    """
    check_node_labels(job.data.wanted_labels)
    wire = Queue(MAX_WAITING, actor_options={"num_cpus": 0})
    record = Record(wire, tracker, job.fit.images)
    try:
        _run_ray_train(job, TrainTask(job, data, manifest, about, wire))
    finally:
        record.close()
        wire.shutdown()
    if record.diverged:
        raise DivergedError(record.diverged)
    return record.last


def _run_ray_train(job: TrainJob, task: TrainTask) -> None:
    # What Ray Train keeps of its own is of no use to us after a crash and can be in the way: our manifests say where to
    # go on. So each start has a folder of its own there, and it is deleted at the end.
    folder, name = job.run, f"ray-{uuid.uuid4().hex}"
    filesystem = None if folder.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))
    trainer = TorchTrainer(
        functools.partial(train_worker, task),
        scaling_config=RayScalingConfig(
            num_workers=job.scaling.workers,
            use_gpu=job.scaling.use_gpu,
            resources_per_worker={"CPU": job.scaling.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder.path(),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.scaling.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": task.open},
        dataset_config=RayDataConfig(execution_options=execution_options(), enable_shard_locality=False),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:  # Ray Train's answer to Ctrl-C, with the exit code 0
        raise KeyboardInterrupt from error
    except ray.train.TrainingFailedError as error:
        failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
        for failure in [getattr(f, "cause", None) or f for f in failures]:
            if isinstance(failure, ConfigurationError | DataError | TryAgainError):
                raise failure from error
        raise TryAgainError(
            f"training stopped: {error}; run the same command to go on from the newest checkpoint"
        ) from error
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own behind
        try:
            (folder / name).delete()
        except (DataError, TryAgainError) as error:
            log.warning("what Ray Train kept of its own stays: %s", error)
