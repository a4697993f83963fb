"""How much of the speed of plain processes does the sampling job keep?

    python benchmarks/factory.py --checkpoint yard/runs/digits --root /tmp/brickyard-factory

A is ``jobs/sample.py`` with so many actors: Ray Data, the read back, the pictures, the manifest. B are as many plain
processes, each of which draws and writes its half of the same shards one after the other, without Ray and without
reading back. They take turns. Told are images per second of the whole command, from its start to its end, and of the
time between the first shards (one for each actor) and the last: what a long night tends to. A/B of that should be at
least 0.95. CPU seconds are not told: Ray's daemons do not hand on those of the processes that they end.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.common import spread
from pipelines.draw_config import DrawConfig
from pipelines.draw_shard import DrawShard
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import plan_samples

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare the sampling job with plain processes."""

    checkpoint: str
    """The folder of a run."""
    root: Path
    """Folder for the samples."""
    shards: int = 64
    shard_images: int = 256
    steps: int = 20
    actors: int = 2
    rounds: int = 3
    part: int = -1
    """Of B: which of the processes this is."""

    def job(self, out: Path) -> SampleJob:
        draw = DrawConfig(steps=self.steps, shard_images=self.shard_images, actors=self.actors)
        seeds = f"0-{self.shards * self.shard_images - 1}"
        return SampleJob(checkpoint=self.checkpoint, out=str(out), seeds=seeds, draw=draw)


def flags(settings: Settings, out: Path) -> list[str]:
    job = settings.job(out)
    return [
        f"--checkpoint={job.checkpoint}", f"--out={out}", f"--seeds={job.seeds}", f"--draw.steps={job.draw.steps}",
        f"--draw.shard-images={job.draw.shard_images}", f"--draw.actors={job.draw.actors}", "--tracking.uri=none",
    ]  # fmt: skip


def run(settings: Settings, out: Path, commands: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Run commands beside each other; return images/s of all of it, and between the shards."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError(f"{commands[0]} failed")
    ended = time.time()
    written = sorted(path.stat().st_mtime for path in out.glob("part-*.parquet"))
    assert len(written) == settings.shards
    counted = settings.shards - settings.actors
    between = counted * settings.shard_images / (written[-1] - written[settings.actors - 1])
    return settings.shards * settings.shard_images / (ended - began), between


def draw_part(settings: Settings, out: Path) -> None:
    """Draw what one of the plain processes has to."""
    torch.set_num_threads(1)
    plan = plan_samples(settings.job(out))
    list(DrawShard(plan)({"id": np.arange(settings.part, settings.shards, settings.actors)}))


def main(settings: Settings) -> None:
    out = settings.root / "out"
    if settings.part >= 0:
        draw_part(settings, out)
        return
    job = [[sys.executable, str(ROOT / "jobs" / "sample.py"), *flags(settings, out)]]
    shared = [
        f"--{name.replace('_', '-')}={getattr(settings, name)}"
        for name in ("checkpoint", "root", "shards", "shard_images", "steps", "actors")
    ]
    plain = [[sys.executable, __file__, *shared, f"--part={part}"] for part in range(settings.actors)]
    rounds = []
    for number in range(settings.rounds):
        a, b = run(settings, out, job), run(settings, out, plain)
        rounds.append((a, b))
        sys.stdout.write(
            f"round {number}: A {a[0]:,.0f} images/s in all, {a[1]:,.0f} between the shards; "
            f"B {b[0]:,.0f}, {b[1]:,.0f}\n"
        )
        sys.stdout.flush()
    for i, what in enumerate(("in all", "between the shards")):
        sys.stdout.write(f"A/B {what}: {spread([a[i] / b[i] for a, b in rounds])}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
