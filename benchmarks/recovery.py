"""How long from a kill to the first new step, how long to the first step at all, and what are they made of?

    python benchmarks/recovery.py --root /tmp/brickyard-recovery

``jobs/train.py digits`` with two workers that report each step and commit a checkpoint every ten. In each round it is
started; a checkpoint and half of the way to the next later SIGKILL meets rank 1; and when it has made 20 steps more it
is interrupted. The parts are what can be seen from outside: processes that come and go, and lines of the log.
Beside it the shortest job that Ray Train and Ray Data can be made to do on the same images: two workers, DDP, one step.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.common import spread

CODE = Path(__file__).parents[1]
BATCH, EVERY = 128, 1_280
STEP = re.compile(r"([\d,]+) of [\d,]+ images ·")
START = re.compile(r"\d+ workers train from (\d+) images on")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure starts and recoveries."""

    root: Path
    """Folder for the runs; it must be new or empty."""
    rounds: int = 3


def workers() -> set[int]:
    """Return the processes of the workers that train, on this machine."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::RayTrainWorker"):
                found.add(int(entry.parent.name))
        except OSError:
            continue
    return found


class Run:
    """A training job as a process, read from outside."""

    def __init__(self, settings: Settings, number: int) -> None:
        flags = {
            "root": settings.root, "name": f"round-{number}", "tracking.uri": "none", "fit.images": 128_000_000,
            "fit.log-images": BATCH, "fit.checkpoint-images": EVERY, "fit.grid-images": 128_000_000,
            "evaluate-images": 0,
        }  # fmt: skip
        self.log = settings.root / f"round-{number}.log"
        words = [f"--{name}={value}" for name, value in flags.items()]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "jobs/train.py", "digits", *words],
            cwd=CODE, stdout=subprocess.DEVNULL, stderr=self.log.open("w"),
        )  # fmt: skip

    def until(self, condition: Callable[[], bool]) -> float:
        """Wait for a condition; return when it came true."""
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return time.monotonic()

    @property
    def starts(self) -> list[int]:
        return [int(position) for position in START.findall(self.log.read_text())]

    @property
    def seen(self) -> int:
        steps = STEP.findall(self.log.read_text())
        return int(steps[-1].replace(",", "")) if steps else 0

    def steps_of(self, start: int) -> list[int]:
        """Return the positions of the steps that a start has made."""
        said = START.split(self.log.read_text())[2::2]
        return [int(step.replace(",", "")) for step in STEP.findall(said[start])] if len(said) > start else []


def recovery(settings: Settings, number: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of a start and those of a recovery, by part."""
    run = Run(settings, number)
    up = run.until(lambda: len(workers()) == 2)
    loaded = run.until(lambda: len(run.starts) == 1)
    first = run.until(lambda: run.seen > 0)
    start = {
        "cluster and workers": up - run.began, "process group, network": loaded - up,
        "stream, first step": first - loaded, "all": first - run.began,
    }  # fmt: skip

    run.until(lambda: run.seen % EVERY == EVERY // 2 and run.seen > EVERY)
    old = workers()
    os.kill(max(old), signal.SIGKILL)
    killed, lost_at = time.monotonic(), run.seen
    gone = run.until(lambda: not workers() & old)
    up = run.until(lambda: len(workers()) == 2)
    loaded = run.until(lambda: len(run.starts) == 2)
    first = run.until(lambda: bool(run.steps_of(1)))
    parts = {
        "noticed and ended": gone - killed, "new workers": up - gone, "process group, checkpoint": loaded - up,
        "stream, first step": first - loaded, "all": first - killed, "images computed again": lost_at - run.starts[1],
    }  # fmt: skip
    run.until(lambda: len(run.steps_of(1)) > 20)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait()
    return start, parts


BARE = """
import os, ray, ray.data, ray.train, torch
from ray.train.torch import TorchTrainer, prepare_model
ray.init(address="local", num_cpus=(os.cpu_count() or 1) + 2, include_dashboard=False, logging_level="ERROR",
         log_to_driver=False)
from benchmarks.common import digits
from jobs.presets import DIGITS
from models.network import build
from pipelines.fit import pixels_to_x_0

def work():
    torch.set_num_threads(1)
    model = prepare_model(build(DIGITS.network, image_channels=1, side=8))
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=64):
        x_0 = pixels_to_x_0(batch["image"])
        model(x_0, torch.randint(1, 1001, (len(x_0),))).square().mean().backward()
        optimizer.step()
        break

images = ray.data.from_items([{"image": image} for image in digits()])
TorchTrainer(work, datasets={"train": images},
             scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
             run_config=ray.train.RunConfig(storage_path=os.environ["BARE_ROOT"])).fit()
"""


def bare(settings: Settings) -> float:
    """Return the seconds of a bare job of one step, from its start to its end."""
    began = time.monotonic()
    environment = os.environ | {"BARE_ROOT": str(settings.root / "bare"), "PYTHONPATH": str(CODE)}
    subprocess.run([sys.executable, "-c", BARE], check=True, cwd=CODE, env=environment, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.root.mkdir(parents=True, exist_ok=True)
    starts, recoveries, bares = [], [], []
    for number in range(settings.rounds):
        start, parts = recovery(settings, number)
        starts.append(start)
        recoveries.append(parts)
        bares.append(bare(settings))
        print(f"round {number}: {json.dumps({'start': start, 'kill': parts, 'bare': bares[-1]})}", flush=True)
    print("min / median / max, in seconds:")
    for words, rounds in (("start to first step", starts), ("kill to first new step", recoveries)):
        for name in rounds[0]:
            print(f"{words}: {name} {spread([each[name] for each in rounds], 1)}")
    print(f"a bare job of one step, from its start to its end: {spread(bares, 1)}")


if __name__ == "__main__":
    main()
