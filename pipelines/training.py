"""Ray Train binds itself to the loop: data → workers → checkpoints → record, samples and score at the end.

Who does what. The *driver* prepares the data, claims the run's folder and alone speaks to MLflow. The *controller* of
Ray Train opens the stream, anew at each start of the workers, at the position of the newest valid checkpoint. The
*workers* load that checkpoint and run :func:`pipelines.fit.fit`; what rank 0 has to say travels through a bounded
queue to the driver, so no tracker can hold a worker up.
"""

import functools
import json
import logging
import math
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import DataConfig as RayDataConfig
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Full, Queue
from torch import Tensor

from models.init import initialize
from models.unet import UNet
from pipelines import checkpoints
from pipelines.checkpoints import Checkpoint
from pipelines.config import SampleJob, TrainJob, flatten, to_dict, to_yaml
from pipelines.digits import write_digits
from pipelines.errors import ConfigurationError, TryAgainError
from pipelines.fit import DivergedError, State, World, fit, new_state, x_0_to_pixels
from pipelines.cluster import cluster
from pipelines.ingest import IngestPlan, ingest
from pipelines.lineage import Trained, git_revision, schedule_of
from pipelines.manifest import NAME, Manifest
from pipelines.pictures import contact_sheet
from pipelines.plan import Plan
from pipelines.progress import TrainingProgress
from pipelines.sampling import SHEET, STRIP, draw_samples, plan_samples
from pipelines.scoring import METRIC, Comparison, score
from pipelines.storage import Folder
from pipelines.stream import Deal, batches, execution_options, open_stream
from pipelines.tracking import Tracker, open_tracker, resolve_uri, without_password

MAX_WAITING = 1000
"""Messages that wait for the driver; further ones are dropped, training goes on."""

log = logging.getLogger("brickyard.train")


@dataclass(frozen=True)
class Report:
    """Metrics of the loop at a position."""

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


@dataclass(frozen=True)
class Started:
    """The workers have started, at a position."""

    position: int
    workers: int


@dataclass(frozen=True)
class TrainTask:
    """All that the controller and the workers need, as one object."""

    job: TrainJob
    data: Folder
    manifest: Manifest
    about: Checkpoint
    wire: Queue

    def deal(self, position: int) -> Deal:
        fit_config = self.job.fit
        return Deal(
            start=position,
            stop=fit_config.images,
            batch_images=fit_config.batch_images,
            micro_images=fit_config.micro_images,
            image_bytes=math.prod(self.manifest.shape),
        )

    def open(self) -> ray.data.Dataset:
        """Open the stream where the newest valid checkpoint is. Called by the controller at each start."""
        found = checkpoints.newest(self.job.run)
        plan = Plan(self.job.seed, self.manifest.rows, self.manifest.row_group_rows, self.job.data.window_chunks)
        return open_stream(self.data, self.manifest, plan, self.deal(found[1].position if found else 0))


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
        began = time.perf_counter()
        checkpoints.commit(self.task.job.run, state, self.task.about, self.world)
        if self.world.rank == 0:
            checkpoints.keep_newest(self.task.job.run, self.task.job.keep_checkpoints)
            self.send(Committed(state.position, time.perf_counter() - began))

    def send(self, message: Report | Picture | Committed | Started) -> None:
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
    height, _, channels = task.manifest.shape
    model = UNet(job.network, channels, height)
    initialize(model, job.seed)  # weights: 1. a function of the seed …
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = new_state(model, job.fit)
    found = [checkpoints.newest(job.run) if world.rank == 0 else None]
    if world.size > 1:
        dist.broadcast_object_list(found)
    if found[0]:
        checkpoints.load(*found[0], state, world)  # … 2. or of the newest checkpoint
    listener = WorkerListener(task, world)
    if world.rank == 0:
        listener.send(Started(state.position, world.size))
    stream = batches(ray.train.get_dataset_shard("train"), task.deal(state.position), world.rank, world.size)
    fit(job.fit, state, schedule_of(job.schedule), job.seed, stream, listener, world)


def train(job: TrainJob) -> dict[str, Any]:
    """Train, then sample and score if asked to. The same command continues what was interrupted.

    Returns:
        What was done: where it is, how long it took, the last loss, the score.

    Raises:
        ConfigurationError: if the run's folder holds a run of another configuration or of other data.
        DataError: if data or storage cannot be used.
        DivergedError: if the gradient is not finite.
        TryAgainError: if workers failed more often than allowed.
    """
    began = time.perf_counter()
    data, found = find_data(job)
    with cluster():
        summary = _train_on(job, data, ingest(found) if isinstance(found, IngestPlan) else found)
    return summary | {"seconds": round(time.perf_counter() - began, 1)}


def _train_on(job: TrainJob, data: Folder, manifest: Manifest) -> dict[str, Any]:
    log.info("data: %d images of %s, digest %s", manifest.rows, "x".join(map(str, manifest.shape)), manifest.digest[:12])
    restarts = claim(job, manifest)
    tracker = open_tracker(
        job.tracking,
        Folder(job.root),
        job.run,
        parameters=flatten(to_dict(job)) | {"data_digest": manifest.digest, "parameters": count_parameters(job, manifest)},
        tags={
            "brickyard.git_revision": git_revision(),
            "brickyard.data_digest": manifest.digest,
            "brickyard.workers": str(job.scaling.workers),
            "brickyard.starts": str(restarts),
        },
    )
    try:
        tracker.file("config.yaml", to_yaml(job).encode())
        about = describe(job, data, manifest, tracker)
        summary = _train(job, data, manifest, about, tracker)
        tracker.tags({"brickyard.export": export(job)})
        if job.evaluate_images:
            summary |= evaluate(job, tracker)
        tracker.finish("FINISHED")
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    return summary | {
        "run": job.run.url,
        "images": job.fit.images,
        "data_digest": manifest.digest,
        "tracking_run": tracker.run_id,
        "see": tracker.url,
    }


def _train(job: TrainJob, data: Folder, manifest: Manifest, about: Checkpoint, tracker: Tracker) -> dict[str, Any]:
    found = checkpoints.newest(job.run)
    if found and found[1].position >= job.fit.images:
        log.info("%s has seen its %d images; nothing to train", job.run.url, found[1].position)
        return {"trained_images": 0}
    wire = Queue(MAX_WAITING, actor_options={"num_cpus": 0})
    pump = _Pump(wire, tracker, job.fit.images)
    log.info("starting %d workers at %d images", job.scaling.workers, found[1].position if found else 0)
    try:
        _run_ray_train(job, TrainTask(job, data, manifest, about, wire))
    finally:
        pump.close()
        wire.shutdown()
        (job.run / "ray").delete()
    return {"trained_images": job.fit.images - (found[1].position if found else 0), **pump.last}


def _run_ray_train(job: TrainJob, task: TrainTask) -> None:
    folder = job.run / "ray"
    filesystem = None if folder.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))
    trainer = TorchTrainer(
        functools.partial(train_worker, task),
        scaling_config=RayScalingConfig(
            num_workers=job.scaling.workers,
            use_gpu=job.scaling.use_gpu,
            resources_per_worker={"CPU": job.scaling.cpus_per_worker},
        ),
        run_config=RunConfig(
            # What Ray Train keeps of its own is of no use to us after a crash and can be in the way: our manifests
            # say where to go on. So each start has a folder of its own there, and it is deleted at the end.
            name=uuid.uuid4().hex,
            storage_path=folder.path(),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=job.scaling.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
        datasets={"train": task.open},
        dataset_config=RayDataConfig(execution_options=execution_options(), enable_shard_locality=False),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = list(getattr(error, "worker_failures", {}).values())
        for failure in [getattr(f, "cause", None) or f for f in failures]:
            if isinstance(failure, DivergedError | ConfigurationError):
                raise failure from error
        raise TryAgainError(
            f"training stopped after {job.scaling.max_failures} restarts: {error}; run the same command to go on from "
            "the newest checkpoint"
        ) from error


class _Pump:
    """Moves messages from the workers to the tracker and to the terminal, in a thread of the driver."""

    def __init__(self, wire: Queue, tracker: Tracker, images: int) -> None:
        self.last: dict[str, float] = {}
        self._wire, self._tracker = wire, tracker
        self._progress = TrainingProgress(images)
        self._closing = threading.Event()
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
            self._take(message)

    def _take(self, message: Report | Picture | Committed | Started) -> None:
        match message:
            case Report(position, metrics):
                self.last = {"loss": metrics["loss"], "images_per_s": round(metrics["images_per_s"], 1)}
                self._progress.update(position, metrics)
                self._tracker.metrics(metrics, position)
            case Picture(position, samples):
                self._tracker.picture(contact_sheet(x_0_to_pixels(samples).numpy()), "samples", position)
            case Committed(position, seconds):
                log.info("checkpoint at %d images, %.2f s", position, seconds)
                self._tracker.metrics({"checkpoint_s": seconds}, position)
            case Started(position, workers):
                log.info("%d workers train from %d images on", workers, position)

    def close(self) -> None:
        """Pass on what still waits, for ten seconds at most."""
        self._closing.set()
        self._thread.join(timeout=10)
        self._progress.close()


def find_data(job: TrainJob) -> tuple[Folder, Manifest | IngestPlan]:
    """Return a job's data set: where it is and its manifest, or, of raw images, how it is to be made.

    Raises:
        DataError: if there are no images, or storage refuses.
        ConfigurationError: if the images do not fit the network.
    """
    source = data_source(job)
    if source.exists(NAME):
        manifest = Manifest.load(source)
        _check_side(job, manifest.side)
        return source, manifest
    _check_side(job, job.data.ingest.side)
    if job.data.builtin == "digits":
        write_digits(source)
    out = data_folder(job)
    return out, IngestPlan.make(source, out, job.data.ingest)


def _check_side(job: TrainJob, side: int) -> None:
    try:
        job.network.check_side(side)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def data_source(job: TrainJob) -> Folder:
    """Return where the images of a job come from."""
    if job.data.builtin == "digits":
        return Folder(job.root) / "data" / "digits"
    return Folder(job.data.url)


def data_folder(job: TrainJob) -> Folder:
    """Return where the raw images of a job are ingested to: one folder for each source and form."""
    form, source = job.data.ingest, data_source(job)
    tag = uuid.uuid5(uuid.NAMESPACE_URL, source.url).hex[:8]
    return Folder(job.root) / "data" / f"{source.name}-{tag}-{form.side}x{form.side}x{form.channels}-{form.encoding}"


def identity(job: TrainJob, manifest: Manifest) -> dict[str, Any]:
    """Return what makes a run the run that it is. The rest (length, workers, reports …) may change between starts."""
    everything = flatten(to_dict(job))
    may_change = ("name", "root", "fit.images", "fit.micro_images", "fit.log_images", "fit.checkpoint_images",
                  "fit.grid_images", "evaluate_images", "keep_checkpoints")  # fmt: skip
    groups = ("data.url", "data.builtin", "data.ingest.", "scaling.", "tracking.", "draw.")
    kept = {k: v for k, v in everything.items() if k not in may_change and not k.startswith(groups)}
    return kept | {"data digest": manifest.digest}


def claim(job: TrainJob, manifest: Manifest) -> int:
    """Write down what the run is, at its first start; later, refuse one that is another. Return which start this is.

    Raises:
        ConfigurationError: naming each field that differs.
    """
    mine = identity(job, manifest)
    if not job.run.create("run.json", json.dumps(mine, indent=1).encode()):
        theirs = json.loads(job.run.get("run.json"))
        differing = [
            f"{name} was {theirs.get(name)}, is {mine.get(name)}"
            for name in sorted(mine | theirs)
            if mine.get(name) != theirs.get(name)
        ]
        if differing:
            raise ConfigurationError(
                f"{job.run.url} is another run: {'; '.join(differing)}. Give this one another --name, or repeat the "
                "settings of that one to continue it"
            )
    start = sum(name.startswith("start-") for name in job.run.names()) + 1
    job.run.put(f"start-{start:04d}.yaml", to_yaml(job).encode())
    return start


def describe(job: TrainJob, data: Folder, manifest: Manifest, tracker: Tracker) -> Checkpoint:
    """Return the manifest of the run's checkpoints, but for the position and the files."""
    return Checkpoint(
        position=0,
        files={},
        config=to_dict(job),
        data_digest=manifest.digest,
        data_url=data.url,
        shape=(manifest.channels, manifest.side, manifest.side),
        labels=manifest.labels,
        tracking_uri=without_password(resolve_uri(job.tracking, Folder(job.root))),
        tracking_run=tracker.run_id,
        git_revision=git_revision(),
    )


def count_parameters(job: TrainJob, manifest: Manifest) -> int:
    """Return the number of the network's parameters, without making them."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(job.network, manifest.channels, manifest.side).parameters())


def export(job: TrainJob) -> str:
    """Write ε_θ and its average as safetensors with a config.json into the run's ``export/``; return its URL."""
    trained, folder = Trained.find(job.run.url), job.run / "export"
    for name, averaged in (("model", False), ("ema", True)):
        weights = {k: v.contiguous() for k, v in trained.network(averaged).state_dict().items()}
        folder.put(f"{name}.safetensors", safetensors.torch.save(weights))
    about = {
        "network": to_dict(job.network),
        "schedule": to_dict(job.schedule),
        "shape": trained.checkpoint.shape,
        "position": trained.checkpoint.position,
        "checkpoint_digest": trained.checkpoint.digest,
    }
    folder.put("config.json", json.dumps(about, indent=1).encode())
    return folder.url


def evaluate(job: TrainJob, tracker: Tracker) -> dict[str, Any]:
    """Draw samples from the newest checkpoint, score them, and record both."""
    position = Trained.find(job.run.url).checkpoint.position
    folder = Folder(job.root) / "samples" / f"{job.name}-{position}"
    drawn = draw_samples(
        plan_samples(
            SampleJob(checkpoint=job.run.url, out=folder.url, seeds=f"0-{job.evaluate_images - 1}", draw=job.draw)
        )
    )
    result = score(Comparison.find(folder, reference=None))
    tracker.metrics({METRIC: result[METRIC]}, position)
    for name in (SHEET, STRIP):
        tracker.file(name, folder.get(name))
    return {
        METRIC: result[METRIC],
        "samples": drawn["samples"],
        "contact_sheet": drawn["contact_sheet"],
        "strip": drawn["strip"],
    }


def dry_run(job: TrainJob) -> dict[str, Any]:
    """Return what the job would do, having reached storage and changed nothing.

    Raises:
        What :func:`train` would raise at its start.
    """
    if job.data.builtin == "digits":
        images, side, channels = 1797, job.data.ingest.side, job.data.ingest.channels
    else:
        _, data = find_data(job)
        images = data.rows if isinstance(data, Manifest) else len(data.paths)
        shape = data if isinstance(data, Manifest) else data.config
        side, channels = shape.side, shape.channels
    resolve_uri(job.tracking, Folder(job.root))
    found = checkpoints.newest(job.run)
    return {
        "dry_run": True,
        "images_in_data": images,
        "epochs": round(job.fit.images / images, 1),
        "steps": job.fit.images // job.fit.batch_images,
        "starts_at": found[1].position if found else 0,
        "memory_per_worker_bytes": memory_per_worker(job, side, channels),
        "run": job.run.url,
    }


def memory_per_worker(job: TrainJob, side: int, channels: int) -> int:
    """Estimate what a worker's model, gradient, optimizer, average and saved activations take, in bytes."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        model = UNet(job.network, channels, side)
        x = torch.empty(job.fit.micro_images, channels, side, side)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, torch.zeros(len(x), dtype=torch.long))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 5 * weights + sum(saved.values())  # weights, gradient, two moments, the average
