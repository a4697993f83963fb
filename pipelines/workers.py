"""Ray Train binds itself to the loop: starts of the workers, and how their work ends.

What runs on them is in :mod:`pipelines.worker`, how they leave before the end in :mod:`pipelines.foreman`.
"""

import functools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
from ray.train import DataConfig as RayDataConfig
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import checkpoints
from pipelines.checkpoint_manifest import Checkpoint
from pipelines.cluster import check_node_labels
from pipelines.config import TrainJob
from pipelines.environment import environment
from pipelines.errors import TryAgainError, root
from pipelines.foreman import OUTSIDE, WAITING_S, Foreman, NotAgain, Trainer
from pipelines.manifest import Manifest
from pipelines.record import MAX_WAITING, Record
from pipelines.scaling import ScalingConfig
from pipelines.storage import Folder
from pipelines.stream import execution_options
from pipelines.tracking import Tracker
from pipelines.worker import TrainTask, train_worker

HEALTH_MARGIN_S = 60.0
"""Beyond scaling.hang_s, after which Ray Train gives a worker up that does not answer."""


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
    record = Record(wire, tracker, job.name, job.fit.images, on_commit)
    try:
        _run_ray_train(job, TrainTask(job, data, manifest, about, wire))
    finally:
        record.close()
        wire.shutdown()
    return {"trained_images": job.fit.images - (record.started_at or 0), **record.last}


def _run_ray_train(job: TrainJob, task: TrainTask) -> None:
    scaling = job.scaling
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    least = scaling.min_workers or scaling.workers
    not_started = (
        f"the workers have not started for {WAITING_S:.0f} s. If there is no room for {least} with {resources} each, "
        "`ray status` says so; to verify a large checkpoint takes its time, too"
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
                Foreman(scaling.max_failures, functools.partial(task.warn, not_started)),
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
    with environment({name: value for name, value in times.items() if name not in os.environ}):
        yield
