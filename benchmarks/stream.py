"""How many images per second does the deterministic stream deliver to those who do nothing with them?

    python benchmarks/stream.py --folder /tmp/brickyard-stream

The digits are ingested into the folder, once. Then, for each number of consumers W, the stream of a run (micro-batches
of 64, global batches of 128) is split over W actors that only check the order, as the training does, and count. The
numbers of consumers take turns, round after round, in one Ray cluster. Told are images per second over the last three
quarters of the run (Ray reads ahead while the first batch is on its way: short runs come out too fast), and CPU seconds
of all processes, the driver's included, per 1,000 images: what the stream takes away from training when both share the
cores. For scale: one thread trains some 400 to 700 of these images per second.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import tyro

from benchmarks.common import spread
from jobs.presets import DIGITS
from pipelines.cluster import cluster
from pipelines.digits import write_digits
from pipelines.images import View
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestPlan
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the deterministic stream."""

    folder: Path
    """Where the digits are put; they are found there the next time."""
    images: int = 1_024_000
    """Length of a run, in images."""
    rounds: int = 3
    consumers: tuple[int, ...] = (1, 2)
    """Numbers of consumers, each a divisor of the batch's micro-batches."""


@ray.remote(num_cpus=0)
class Consumer:
    """Takes its part of the stream and does nothing with it."""

    def consume(self, shard: Any, deal: Deal, rank: int, world: int) -> tuple[float, float, int]:
        """Return when a quarter of the images had come and when all, and the images between."""
        stream = batches(shard, deal, rank, world)
        skipped = sum(len(batch.position) for batch in islice(stream, deal.stop // (4 * world * deal.micro_images)))
        began = time.time()
        images = sum(len(batch.position) for batch in stream)
        assert skipped + images == deal.stop // world
        return began, time.time(), images


def deliver(folder: Folder, manifest: Manifest, images: int, world: int) -> tuple[float, float]:
    """Run one stream to its end; return images per second and CPU seconds per 1,000 images."""
    fit = DIGITS.fit
    windows = window_batches(DIGITS.data.window_bytes, manifest.row_bytes, fit.batch_images)
    deal = Deal(
        start=0,
        stop=images,
        batch_images=fit.batch_images,
        micro_images=fit.micro_images,
        window_batches=windows,
        image_bytes=64,
    )
    plan = Plan(0, manifest.rows, manifest.row_group_rows, windows * fit.batch_images)
    view = View(side=8, channels=1)
    read = ReadWindow(
        folder, manifest, plan, deal, view, random_crop=False, max_bad_share=0.0, quarantine=folder / "quarantine"
    )
    consumers = [Consumer.remote() for _ in range(world)]
    spent = cpu_seconds()
    shards = open_stream(read).streaming_split(world, equal=True)
    told = ray.get(
        [
            actor.consume.remote(shard, deal, i, world)
            for i, (actor, shard) in enumerate(zip(consumers, shards, strict=True))
        ]
    )
    spent = cpu_seconds() - spent
    began, ended, counted = zip(*told, strict=True)
    return sum(counted) / (max(ended) - min(began)), 1000 * spent / images


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all below it: of Ray's, the workers that still live."""
    import psutil  # comes with Ray, which must be imported first

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    raw, out = Folder(str(settings.folder / "raw")), Folder(str(settings.folder / "data"))
    speed, cost = defaultdict(list), defaultdict(list)
    with cluster():
        write_digits(raw)
        manifest = ingest(IngestPlan.make(raw, out, DIGITS.data.ingest))
        deliver(out, manifest, 64_000, 1)  # warms up
        for _ in range(settings.rounds):
            for world in settings.consumers:
                images_per_s, cpu_s = deliver(out, manifest, settings.images, world)
                speed[world].append(images_per_s)
                cost[world].append(cpu_s)
                print(f"W = {world}: {images_per_s:,.0f} images/s, {cpu_s:.3f} CPU-s per 1,000 images", flush=True)
    for world in settings.consumers:
        print(f"W = {world}: images/s {spread(speed[world], 0)}; CPU-s per 1,000 images {spread(cost[world])}")


if __name__ == "__main__":
    main()
