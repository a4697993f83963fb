"""How much of a bare loop's speed does the whole stack keep?

    python benchmarks/stack.py --root /tmp/brickyard-stack
    python benchmarks/stack.py --root /tmp/brickyard-stack-2 --workers 2

A is ``jobs/train.py digits`` with workers of one thread: Ray Data, the deterministic stream, Ray Train, the queue to
the driver, MLflow on SQLite. B is a bare PyTorch loop, in as many bare processes with DDP over gloo: the same network
and first weights, as many micro-batches of 64 per step, the same AdamW, clipping and average of the weights, but the
images as tensors in memory and ``torch.randn`` and ``torch.randint`` for ε and t. With one worker F stands between
them, ``pipelines.fit.fit`` alone, fed out of memory: A/F is what Ray costs, F/B what the loop does.

They take turns, A F B A F B: a round is a fresh run of A, of which the reports after the first are counted (19,200
images), then as many images of F and of B, after a warm-up that is not counted. Checkpoints and sample grids fall
after A's last report: how often they are made is the user's choice, and a bare loop makes none. Ray runs its workers at
niceness 15; here it is told 0, so that other programs on the machine hold A up no more than B. Targets: A/B at least
0.975 with one worker, 0.97 with two.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import digits, micro_batches, spread
from jobs.presets import DIGITS
from models.init import initialize
from models.network import build
from models.schedule import article
from pipelines.fit import Listener, fit, new_state, pixels_to_x_0

REPORT = 3_200
"""Images between two of A's reports; also B's warm-up."""
TRAIN = Path(__file__).parents[1] / "jobs" / "train.py"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare the whole stack with a bare loop."""

    root: Path
    """Folder for the runs of A; it must be new or empty."""
    workers: int = 1
    """Of A, and processes of B."""
    rounds: int = 5
    images: int = 19_200
    """Images counted on each side in a round; a multiple of 3,200."""


def stack(settings: Settings, run: int) -> float:
    """Run A once and return its images per second, the first report left out."""
    images, database = settings.images + REPORT, settings.root / "mlflow.db"
    flags = {
        "root": settings.root,
        "name": f"round-{run}",
        "tracking.uri": f"sqlite:///{database}",
        "fit.images": images,
        "fit.log-images": REPORT,
        "fit.checkpoint-images": images,
        "fit.grid-images": images,
        "scaling.workers": settings.workers,
        "scaling.threads-per-worker": 1,
        "evaluate-images": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(TRAIN), "digits", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"RAY_worker_niceness": "0"},
    )
    tracked = json.loads(done.stdout.splitlines()[-1])["mlflow_run"]
    query = "select value from metrics where run_uuid = ? and key = 'images_per_s' order by step"
    with closing(sqlite3.connect(database)) as connection:
        speeds = [value for (value,) in connection.execute(query, (tracked,))]
    assert len(speeds) == images // REPORT, speeds
    return steady(speeds)


def alone(settings: Settings, _: int) -> float:
    """Run F once and return its images per second, the first report left out."""
    images = settings.images + REPORT
    config = replace(DIGITS.fit, images=images, log_images=REPORT, checkpoint_images=images, grid_images=images)
    model = build(DIGITS.network, image_channels=1, side=8)
    initialize(model, 0)
    state, listener = new_state(model.to(memory_format=torch.channels_last), config, article()), Speeds()
    fit(config, state, article(), 0, micro_batches(digits(), config, 0), listener)
    return steady(listener.speeds)


class Speeds(Listener):
    """Keeps the reports of F."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def report(self, metrics: dict[str, float], position: int) -> None:
        self.speeds.append(metrics["images_per_s"])


def steady(speeds: list[float]) -> float:
    """Return the images per second of all reports but the first."""
    return (len(speeds) - 1) / sum(1 / speed for speed in speeds[1:])


def bare(rank: int, size: int) -> Iterator[None]:
    """Train for ever, B images at each turn: what one writes on a single page."""
    config, table = DIGITS.fit, article()
    alpha_bar, beta_bar = table.alpha_bar.float(), table.beta_bar.float()
    x_0 = pixels_to_x_0(torch.tensor(digits())).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(rank)
    model = build(DIGITS.network, image_channels=1, side=8)
    initialize(model, 0)
    model = model.to(memory_format=torch.channels_last)
    network = DistributedDataParallel(model) if size > 1 else model
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    here = config.micro_batches // size
    while True:
        for _ in range(here):
            rows = torch.randint(len(x_0), (config.micro_images,))
            t = torch.randint(1, table.steps + 1, (config.micro_images,))
            eps = torch.randn(config.micro_images, 1, 8, 8)
            x_t = alpha_bar[t].view(-1, 1, 1, 1) * x_0[rows] + beta_bar[t].view(-1, 1, 1, 1) * eps
            ((eps - network(x_t, t)).square().mean() / here).backward()  # of two processes each has one a step
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.005)
        yield


def timed(rank: int, settings: Settings, folder: str) -> None:
    """Write the bare loop's images per second, after a warm-up. (all ranks)"""
    torch.set_num_threads(1)
    if settings.workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=settings.workers)
    loop = bare(rank, settings.workers)
    for _ in range(REPORT // DIGITS.fit.batch_images):
        next(loop)
    began = time.perf_counter()
    for _ in range(settings.images // DIGITS.fit.batch_images):
        next(loop)
    Path(folder, f"speed-{rank}").write_text(str(settings.images / (time.perf_counter() - began)))
    if settings.workers > 1:
        dist.destroy_process_group()


def bare_speed(settings: Settings, _: int) -> float:
    """Run B once and return its images per second."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(timed, (settings, folder), settings.workers)  # type: ignore[no-untyped-call]
        return float(Path(folder, "speed-0").read_text())


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    assert settings.images % REPORT == 0, settings.images
    assert DIGITS.fit.micro_batches % settings.workers == 0, settings.workers
    torch.set_num_threads(1)
    sides = {"A": stack, "F": alone, "B": bare_speed} if settings.workers == 1 else {"A": stack, "B": bare_speed}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(settings.rounds):
        for side, measure in sides.items():
            speeds[side].append(measure(settings, number))
        print(f"round {number}: {', '.join(f'{side} {found[-1]:.0f}' for side, found in speeds.items())}", flush=True)
    print("min / median / max:")
    for side, found in speeds.items():
        print(f"{side} {spread(found, 0)} images/s")
    for over, under in (("A", "F"), ("F", "B"), ("A", "B")):
        if over in speeds and under in speeds:
            print(f"{over}/{under} {spread([x / y for x, y in zip(speeds[over], speeds[under], strict=True)])}")


if __name__ == "__main__":
    main()
