"""Does the stream scale: in memory, in the time to the first batch, in consumers?

    python benchmarks/scale.py --folder /tmp/brickyard-loaders            # data.py of benchmarks/loaders made it

*Memory.* A data set of pixels that is four times as large as Ray's object store is streamed twice through. Told for
each quarter of the way: the peak of what all processes hold (PSS: a page that n share counts 1/n), and of what lies in
the object store. Flat is what is wanted.

*First batch.* From the opening of the stream to its first batch, in a warm cluster: of 4,000 images, of a manifest of a
million rows (the same shard under 250 names), and, of a thousand million, what the plan takes for its first window.

*Consumers.* W actors that sleep for each micro-batch of 64 as long as a GPU of 200 images/s would work on it, fed from
JPEGs of 256 to 512 pixels a side: images per second beside the demand, and how much of their time they wait.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import tyro

from benchmarks.common import spread
from benchmarks.loaders.tree import Watch
from pipelines.cluster import cluster
from pipelines.config import DataConfig
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream

SIDE, MICRO = 64, 64
STORE_BYTES, LARGER = 256 << 20, 4
VIEW = View(side=SIDE, channels=3)
IMAGE_BYTES = math.prod(VIEW.shape)
GPU_IMAGES_PER_S = 200
Part = Literal["memory", "first", "consumers"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure how the stream scales."""

    folder: Path
    """Where benchmarks/loaders/data.py put the pictures."""
    parts: tuple[Part, ...] = ("memory", "first", "consumers")
    consumers: tuple[int, ...] = (1, 2, 4, 8)
    batches: int = 40
    """Length of a run of the consumers, in micro-batches of each."""


def stream(folder: Folder, manifest: Manifest, images: int, batch: int) -> ReadWindow:
    """Return the task of a stream of so many images, rounded down to batches."""
    windows = window_batches(DataConfig().window_bytes, manifest.row_bytes, batch)
    deal = Deal(
        start=0, stop=images // batch * batch, batch_images=batch, micro_images=MICRO, window_batches=windows,
        image_bytes=IMAGE_BYTES,
    )  # fmt: skip
    plan = Plan(0, manifest.rows, manifest.row_group_rows, windows * batch)
    return ReadWindow(
        folder, manifest, plan, deal, VIEW, random_crop=False, max_bad_share=0.0, quarantine=folder / "quarantine"
    )


def under_many_names(folder: Path, out: Path, times: int) -> Manifest:
    """Return the manifest of a data set that is another one so many times over, its shards being links to the same."""
    manifest = Manifest.load(Folder(str(folder)))
    out.mkdir(exist_ok=True)
    shards = []
    for i in range(times):
        for shard in manifest.shards:
            name = f"{i:06d}-{shard.name}"
            if not (out / name).exists():
                os.link(folder / shard.name, out / name)
            shards.append(dataclasses.replace(shard, name=name))
    return dataclasses.replace(manifest, shards=shards)


def pixels(settings: Settings, rows: int, name: str) -> tuple[Folder, Manifest]:
    source, out = settings.folder / "pixels", settings.folder / name
    manifest = under_many_names(source, out, -(-rows // Manifest.load(Folder(str(source))).rows))
    return Folder(str(out)), manifest


def object_store_bytes() -> float:
    free = ray.available_resources().get("object_store_memory", 0.0)
    return float(ray.cluster_resources()["object_store_memory"] - free)


def memory(settings: Settings) -> None:
    folder, manifest = pixels(settings, LARGER * STORE_BYTES // IMAGE_BYTES, "pixels-large")
    read = stream(folder, manifest, 2 * manifest.rows, 2 * MICRO)
    quarters = [time.monotonic()]
    with Watch(object_store_bytes) as watch:
        (shard,) = open_stream(read).streaming_split(1, equal=True)
        for batch in batches(shard, read.deal, 0, 1):
            if (batch.position[-1] + 1) * 4 // read.deal.stop > len(quarters) - 1:
                quarters.append(time.monotonic())
    print(f"memory: {manifest.rows:,} images, {manifest.rows * IMAGE_BYTES >> 20} MB, through a store of "
          f"{STORE_BYTES >> 20} MB, {read.deal.stop / (quarters[-1] - quarters[0]):,.0f} images/s")  # fmt: skip
    for i, (begin, end) in enumerate(itertools.pairwise(quarters)):
        here = [(held, stored) for at, held, stored in watch.seen if begin <= at < end] or [(0, 0.0)]
        held, stored = (max(column) for column in zip(*here, strict=True))
        print(f"  quarter {i + 1}: all processes {held / 1e6:,.0f} MB, object store {stored / 1e6:,.0f} MB", flush=True)


def first(settings: Settings) -> None:
    for rows in (4_000, 1_000_000):
        folder, manifest = pixels(settings, rows, f"pixels-{rows}")
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            read = stream(folder, manifest, 10 * manifest.rows, 2 * MICRO)
            (shard,) = open_stream(read).streaming_split(1, equal=True)
            coming = batches(shard, read.deal, 0, 1)
            next(coming)
            seconds.append(time.perf_counter() - began)
            del shard, coming
        print(f"first batch of {manifest.rows:,} images: {spread(seconds, 2)} s", flush=True)
    began = time.perf_counter()
    Plan(0, 10**9, 128, 2048).rows(7 * 10**8 // 2048 * 2048, 7 * 10**8 // 2048 * 2048 + 2048)
    print(f"the plan of a window of 1,000,000,000 images: {1000 * (time.perf_counter() - began):.1f} ms")


@ray.remote(num_cpus=0)
class Sleeper:
    """Works on nothing as long as a GPU would work on something."""

    def consume(self, shard: Any, deal: Deal, rank: int, world: int, skip: int) -> tuple[float, float, int]:
        """Return seconds in all, those of waiting, and images; of all but the first micro-batches."""
        coming: Iterator[Any] = batches(shard, deal, rank, world)
        for _ in range(skip):
            next(coming)
        began, waited, images = time.perf_counter(), 0.0, 0
        asked = began
        for batch in coming:
            waited += time.perf_counter() - asked
            time.sleep(len(batch.position) / GPU_IMAGES_PER_S)
            images += len(batch.position)
            asked = time.perf_counter()
        return time.perf_counter() - began, waited, images


def consumers(settings: Settings) -> None:
    folder = Folder(str(settings.folder / "keep"))
    manifest, most = Manifest.load(folder), max(settings.consumers)
    for world in settings.consumers:
        read = stream(folder, manifest, settings.batches * world * MICRO, most * MICRO)
        shards = open_stream(read).streaming_split(world, equal=True)
        work = [Sleeper.remote().consume.remote(shards[i], read.deal, i, world, most // world) for i in range(world)]  # type: ignore[attr-defined]
        told = np.array(ray.get(work))
        speed = told[:, 2].sum() / told[:, 0].max()
        print(
            f"{world} consumers: {speed:,.0f} of {world * GPU_IMAGES_PER_S:,} images/s, waiting "
            f"{100 * told[:, 1].sum() / told[:, 0].sum():.0f} % of their time",
            flush=True,
        )


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("RAY_worker_niceness", "0")
    for part in settings.parts:
        if part == "memory":
            ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False,
                     object_store_memory=STORE_BYTES)  # fmt: skip
            memory(settings)
            ray.shutdown()
        else:
            with cluster():
                {"first": first, "consumers": consumers}[part](settings)


if __name__ == "__main__":
    main()
