"""Our stream, and a plain Ray Data pipeline beside it: contestants of the project's own environment."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ExecutionOptions

from benchmarks.loaders.contestants import BATCH, SHUFFLE
from benchmarks.loaders.decoders import DECODERS, SIDE, Decoder
from pipelines.cluster import cluster
from pipelines.config import DataConfig
from pipelines.images import View
from pipelines.kept import kept
from pipelines.manifest import Manifest
from pipelines.plan import Plan, window_batches
from pipelines.storage import Folder
from pipelines.stream import Deal, ReadWindow, batches, open_stream

LONG = 2**17
"""Images of a run that outlasts every measurement."""


def ready(name: str) -> AbstractContextManager[Any]:
    """Start the cluster, which is not counted in the time to the first batch."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other programs hold ours up more than its peers
    return cluster()


def open_ours(folder: str, ordered: bool = True) -> Iterable[Any]:
    data = Folder(folder)
    manifest, view = Manifest.load(data), View(side=SIDE, channels=3)
    image_bytes, batch = math.prod(view.shape), 2 * BATCH
    # Two micro-batches in a batch, as where two workers train; both are taken here.
    windows = window_batches(DataConfig().window_bytes, manifest.row_bytes, batch)
    deal = Deal(
        start=0, stop=LONG, batch_images=batch, micro_images=BATCH, window_batches=windows, image_bytes=image_bytes
    )
    plan = Plan(0, manifest.rows, manifest.row_group_rows, windows * batch)
    folder = kept(data, manifest.digest, float(os.environ.get("KEEP_GB", "0")))
    read = ReadWindow(
        folder, manifest, plan, deal, view, random_crop=False, max_bad_share=0.0, quarantine=data / "quarantine"
    )
    stream = open_stream(read)
    if not ordered:
        stream.context.execution_options = ExecutionOptions()
    (shard,) = stream.streaming_split(1, equal=True)
    if ordered:
        return ((batch.image, batch.label) for batch in batches(shard, deal, 0, 1))
    return ((b["image"], b["label"]) for b in shard.iter_batches(batch_size=None, prefetch_batches=4))


def ours_raw(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """Our stream of raw files, where they are."""
    return open_ours(f"{url}/in-place")


def ours_shards(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """Our stream of shards that hold the files as they were."""
    return open_ours(f"{url}/keep")


def ours_unordered(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """The same, with the blocks in whatever order they are ready: what the deterministic order costs."""
    return open_ours(f"{url}/keep", ordered=False)


def ours_pixels(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """Our stream of shards that hold pixels of the training size: nothing is left to decode."""
    return open_ours(f"{url}/pixels")


class plain:  # noqa: N801  (called like the other contestants)
    """Ray Data as its guides show it: Parquet in any order of the files, decoded, through a local shuffle buffer."""

    def __init__(self, url: str, decoder: Decoder, workers: int) -> None:
        decode = DECODERS[decoder]

        def decoded(rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {"image": np.stack([decode(data) for data in rows["image"]]), "label": rows["label"]}

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.read_parquet(f"{url}/parquet", shuffle="files")
        self.rows = rows.map_batches(decoded, batch_size=BATCH)

    def __iter__(self) -> Iterator[Any]:
        settings = {"batch_size": BATCH, "local_shuffle_buffer_size": SHUFFLE, "prefetch_batches": 2}
        for batch in self.rows.iter_batches(**settings):
            yield batch["image"], batch["label"]
