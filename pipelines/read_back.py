"""Samples read back: proof, of every picture in every form, that what was written is there.

What runs as a task is here, away from the drawing: its process need not wait for torch.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray.data

from pipelines import sample_shards
from pipelines.cluster import cluster
from pipelines.errors import DataError
from pipelines.sample_set import MANIFEST, SUCCESS
from pipelines.sample_shards import DamagedShardError, Form
from pipelines.storage import Folder

log = logging.getLogger("brickyard.sampling")

FEW = 8
"""Shards that are read back here; more of them by tasks."""
AGAIN = f"delete that file and {SUCCESS}, and run the sampling job again"


@dataclass(frozen=True)
class ReadBack:
    """The task: the number of a shard to what its manifest says of it, or to what is wrong with it."""

    out: Folder
    seeds: range
    shard_images: int
    shape: tuple[int, int, int]
    """Of the pictures, [C, H, W]."""
    also: tuple[Form, ...]
    labels: list[str]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = row["shard"]
        seeds = self.seeds[shard * self.shard_images : (shard + 1) * self.shard_images]
        try:
            found = sample_shards.check(self.out, shard, seeds, self.shape, self.also, self.labels)
        except DamagedShardError as error:
            return row | {"found": "", "wrong": str(error)}
        return row | {"found": json.dumps(found), "wrong": ""}

    def all(self, shards: list[int]) -> Iterator[dict[str, Any]]:
        """Yield what each shard is, or what is wrong with it."""
        rows = [{"shard": shard} for shard in shards]
        yield from ray.data.from_items(rows).map(self).iter_rows() if len(shards) > FEW else map(self, rows)


def verify(folder: Folder) -> dict[str, Any]:
    """Prove that a finished folder holds each of its seeds once, as written, and that every picture decodes.

    Raises:
        DataError: at the first thing that is not as it must be.
    """
    if not folder.exists(SUCCESS):
        raise DataError(f"{folder.url} is not finished: it has no {SUCCESS}; run the sampling job again")
    about = json.loads(folder.get(MANIFEST))
    first, last = about["seeds"]
    files, seeds = about["files"], range(first, last + 1)
    per_shard = about.get("shard_images", files[0]["images"])
    also, labels = tuple(about.get("also", ())), about.get("labels", [])
    read = ReadBack(folder, seeds, per_shard, tuple(about["shape"]), also, labels)
    if len(files) * per_shard < len(seeds) or sum(file["images"] for file in files) != len(seeds):
        raise DataError(f"{folder.url} does not hold each seed of {first}-{last} once; {AGAIN}")
    with cluster() if len(files) > FEW else nullcontext():
        for row in read.all(list(range(len(files)))):
            if row["wrong"]:
                raise DataError(f"{row['wrong']}; {AGAIN}")
            if (found := json.loads(row["found"])) != files[row["shard"]]:
                raise DataError(f"{folder.url}/{found['name']} is not what was written: its sha256 differs; {AGAIN}")
    log.info("verified: %d samples, each once and as it was written", len(seeds))
    return {"samples": folder.url, "verified": len(seeds)}
