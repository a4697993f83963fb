"""Our stream, and a plain Ray Data pipeline beside it: contestants of the project's own environment."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from benchmarks.common import CHUNK_ROWS, WINDOW_CHUNKS
from benchmarks.loaders.contestants import BATCH, SHUFFLE
from benchmarks.loaders.decoders import DECODERS, SIDE, Decoder
from pipelines.cluster import cluster
from pipelines.manifest import Manifest
from pipelines.plan import Plan
from pipelines.storage import Folder
from pipelines.stream import Deal, batches, open_stream

LONG = 2**17
"""Images of a run that outlasts every measurement."""


def ready(name: str) -> AbstractContextManager[Any]:
    """Start the cluster, which is not counted in the time to the first batch."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else other programs hold ours up more than its peers
    return cluster()


def shards(url: str, decoder: Decoder, workers: int) -> Iterable[Any]:
    """Our stream of what jobs/ingest.py made."""
    assert decoder == "same", decoder
    folder = Folder(f"{url}/shards")
    manifest = Manifest.load(folder)
    # Two micro-batches in a batch, as where two workers train; both are taken here.
    deal = Deal(start=0, stop=LONG, batch_images=2 * BATCH, micro_images=BATCH, image_bytes=3 * SIDE**2)
    stream = open_stream(folder, manifest, Plan(0, manifest.rows, CHUNK_ROWS, WINDOW_CHUNKS), deal)
    (shard,) = stream.streaming_split(1, equal=True)
    return ((batch.image, batch.label) for batch in batches(shard, deal, 0, 1))


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
