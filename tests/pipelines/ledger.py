"""Streams a data set to W consumers, each of which writes down what it is given. A script, so that it can be killed.

python -m tests.pipelines.ledger DATA OUT WORKERS START
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from pipelines.cluster import cluster
from pipelines.images import View
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream

BATCH, STOP = 48, 48 * 36
VIEW = View(side=64, channels=3, zoom=1.25)


class Entry(NamedTuple):
    """What was given out at a position."""

    row: int
    pixels: int
    """Their checksum."""


def task(data: Folder, start: int) -> ReadWindow:
    manifest = Manifest.load(data)
    deal = Deal(start=start, stop=STOP, batch_images=BATCH, micro_images=4, window_batches=4, image_bytes=64 * 64 * 3)
    plan = Plan(0, manifest.rows, manifest.row_group_rows, 4 * BATCH)
    return ReadWindow(
        data, manifest, plan, deal, VIEW, random_crop=True, max_bad_share=0.0, quarantine=data / "quarantine"
    )


def expected(data: Folder) -> dict[int, Entry]:
    """Return the ledger of a run without Ray, without workers and without faults."""
    whole = task(data, 0)
    parts = [part for window in whole.deal.windows for part in whole.read(window)]
    position, row, image = (np.concatenate([part[name] for part in parts]) for name in ("position", "row", "image"))
    entries = (Entry(int(i), zlib.crc32(picture.tobytes())) for i, picture in zip(row, image, strict=True))
    return {p: entry for p, entry in zip(position.tolist(), entries, strict=True) if p < STOP}


def written(out: Path) -> dict[int, Entry]:
    """Read what the consumers of a run wrote; nothing may have been given to two of them."""
    ledger: dict[int, Entry] = {}
    for file in out.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            for position, row, pixels in json.loads(line)["images"]:
                assert position not in ledger, f"{position} was given out twice"
                ledger[position] = Entry(row, pixels)
    return ledger


def retried(out: Path) -> int:
    """Return how many requests to storage the consumers heard of that had to be repeated."""
    return sum(json.loads(line)["retried"] for file in out.glob("*.jsonl") for line in file.read_text().splitlines())


@ray.remote(num_cpus=0)
class Consumer:
    """A simulated worker: it takes its micro-batches, and a moment for each."""

    def consume(self, shard: Any, deal: Deal, rank: int, world: int, out: str) -> None:
        file = os.open(f"{out}/{rank}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for batch in batches(shard, deal, rank, world):
            sums = [zlib.crc32(image.tobytes()) for image in batch.image]
            images = list(zip(batch.position.tolist(), batch.row.tolist(), sums, strict=True))
            os.write(file, (json.dumps({"images": images, "retried": batch.retried}) + "\n").encode())  # whole or not
            time.sleep(0.01)


def main(data: str, out: str, workers: str, start: str) -> None:
    world, read = int(workers), task(Folder(data), int(start))
    Path(out).mkdir(parents=True, exist_ok=True)
    with cluster():
        consumers = [Consumer.remote() for _ in range(world)]
        shards = open_stream(read).streaming_split(world, equal=True)
        ray.get([c.consume.remote(shards[i], read.deal, i, world, out) for i, c in enumerate(consumers)])


if __name__ == "__main__":
    main(*sys.argv[1:])
