"""What a run takes: memory of a worker, images per second, hours and their price. Nothing is trained for it, but for
the few steps on made-up images that one may ask for."""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.network import EpsNetwork, build
from models.parallelize import construct, set_how_to_compute
from pipelines.config import TrainJob
from pipelines.errors import ConfigurationError
from pipelines.fit import Listener, fit, new_state
from pipelines.images import View
from pipelines.stream import Batch

FLOAT = 4
"""Bytes of a weight, of its gradient, its moments and its averages: float32, whatever is computed in."""


def size(job: TrainJob, view: View, classes: int, images: int, image_bytes: int | None) -> dict[str, Any]:
    """Return what a run takes, by name; what cannot be told is None.

    Args:
        job: the run.
        view: how it sees the pictures.
        classes: of the network, 0 for none.
        images: that are still to be seen.
        image_bytes: of one as it is read, if that is known.
    """
    memory, parameters = memory_per_worker(job, view, classes)
    config, workers, price = job.sizing, job.scaling.workers, job.sizing.price_per_hour
    by, of_one = "sizing.images_per_s_per_worker", config.images_per_s_per_worker
    if config.measure_steps:
        by = f"measured: {config.measure_steps} steps of one worker on this machine"
        of_one = measure(job, view, classes)
    rate = of_one * workers * (1 - job.fit.idle_share(workers))
    hours = images / rate / 3600 if rate else None
    worker_hours = hours * workers if hours is not None else None
    return {
        "parameters": parameters,
        "memory_per_worker": memory,
        "memory_is": "exact but for gathered and activations, which are estimates: of what is kept for the way back, "
        "without what an operation needs while it runs",
        "images_per_s": _rounded(rate or None),
        "images_per_s_by": by if rate else None,
        "data_images_per_s": _rounded(rate or None),
        "data_mb_per_s": _rounded(rate * image_bytes / 1e6 if rate and image_bytes else None),
        "hours": _rounded(hours),
        "worker_hours": _rounded(worker_hours),
        "cost": _rounded(worker_hours * price if worker_hours is not None and price else None),
    }


def _rounded(value: float | None) -> float | None:
    """Four digits: no reckoning is better than that."""
    return None if value is None else float(f"{value:.4g}")


def memory_per_worker(job: TrainJob, view: View, classes: int) -> tuple[dict[str, int], int]:
    """Return what one worker holds in bytes, by name and in all, and the parameters of the network.

    It is the one worker that holds most, of as few workers as there may be. Of a weight that is shared out each has as
    many whole rows as there are when they are dealt evenly, or fewer. ``total`` is the memory of the device: of a run
    on GPUs the copy that is being saved lies in the host's.
    """
    with torch.device("meta"):
        model = build(job.network, view.channels, view.side, classes)
    parameters = list(model.parameters())
    # Least of all workers that there may be: then each has the largest part.
    shares = job.parallel.shares(job.scaling.min_workers or job.scaling.workers)
    mine = FLOAT * sum(-(-len(p) // shares) * (p.numel() // len(p)) for p in parameters)
    averages = 1 + len(job.fit.ema.power_stds)
    memory = {
        "weights": mine,
        "gradient": mine,
        "optimizer": 2 * mine + FLOAT * len(parameters),  # two moments, and a count of steps for each
        "averages": averages * mine,
        "gathered": _gathered(model, job.parallel.precision) if shares > 1 else 0,
        "activations": _activations(job, view, classes),
    }
    copy = (3 + averages) * mine  # all but the gradient
    total = sum(memory.values()) + (0 if job.scaling.use_gpu else copy)
    return {**memory, "copy_being_saved": copy, "total": total}, sum(p.numel() for p in parameters)


def _gathered(model: EpsNetwork, precision: str) -> int:
    """Estimate what a worker holds beside its share while it computes a block: the whole of that block, of the next,
    which is on its way, and of what is in no block; and the gradient of one, before it is shared out."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
    ends = sum(p.numel() for p in model.parameters()) - sum(sizes)
    whole, one = sum(sorted(sizes)[-2:]) + ends, max(*sizes, ends)
    return (FLOAT // 2 if precision == "bfloat16" else FLOAT) * whole + FLOAT * one


def _activations(job: TrainJob, view: View, classes: int) -> int:
    """Return what is kept of a micro-batch's way through the network for the way back, in bytes.

    The network is run on tensors that have a shape and no content.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = build(job.network, view.channels, view.side, classes)
        set_how_to_compute(model, replace(job.parallel, compile=False), torch.device("cpu"))
        x = torch.empty(job.fit.micro_images, view.channels, view.side, view.side)
        t = torch.zeros(len(x), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x, t, t) if classes else model(x, t)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        del out
    return sum(size for storage, size in kept.items() if storage not in own)


def _made_up(b: int, view: View, classes: int) -> Iterator[Batch]:
    """Yield micro-batches of grey pictures, for ever."""
    image = np.full((b, view.side, view.side, view.channels), 128, np.uint8)
    for first in itertools.count(0, b):
        position = np.arange(first, first + b)
        yield Batch(position, position, position % classes if classes else np.full(b, -1), image)


class _Stopwatch(Listener):
    """Notes the rate of each step, and leaves after so many."""

    def __init__(self, steps: int) -> None:
        self._left, self.rates = steps, list[float]()

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.rates.append(metrics["images_per_s"])

    def notice(self) -> bool:
        self._left -= 1
        return self._left == 0


def measure(job: TrainJob, view: View, classes: int) -> float:
    """Train alone on made-up images, as much of each batch as a worker of the job has, and return the images per second
    of a step: the median, without the first one.

    Raises:
        ConfigurationError: if the job wants a GPU, and there is none here.
    """
    if job.scaling.use_gpu and not torch.cuda.is_available():
        raise ConfigurationError(
            f"sizing.measure_steps is {job.sizing.measure_steps} and scaling.use_gpu True; there is no GPU here: "
            "measure on a machine that has one, or give --sizing.images-per-s-per-worker"
        )
    device = torch.device("cuda" if job.scaling.use_gpu else "cpu")
    steps, b = 1 + job.sizing.measure_steps, job.fit.micro_images
    batch = -(-job.fit.micro_batches // job.scaling.workers) * b
    far = (steps + 1) * batch  # which it does not come to
    config = replace(
        job.fit,
        batch_images=batch,
        log_images=batch,
        images=far,
        checkpoint_images=far,
        grid_images=far,
        decay_images=0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(job.scaling.threads_per_worker)
    try:
        model, parallel = construct(
            lambda: build(job.network, view.channels, view.side, classes), job.seed, job.parallel, device
        )
        schedule, watch = job.schedule.tables(), _Stopwatch(steps)
        fit(config, new_state(model, config, schedule, parallel), schedule, job.seed, _made_up(b, view, classes), watch)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(watch.rates[1:])
