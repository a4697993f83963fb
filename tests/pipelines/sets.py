"""Sets of pictures to be compared, written as the jobs write them but without a network or a cluster."""

import numpy as np

from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.storage import Folder
from tests.pipelines import sample_sets


def write_samples(
    out: Folder, pixels: np.ndarray, labels: np.ndarray | None = None, shard: int = 100, **lineage: object
) -> Folder:
    """Write a finished set of samples, uint8 [n, H, W, C], of seeds from 0."""
    known = {"data_url": "", "data_digest": "", "tracking_uri": "none", "tracking_run": ""} | lineage
    return sample_sets.write_samples(out, pixels, known, 0, shard, labels)


def write_data(out: Folder, pixels: np.ndarray, labels: np.ndarray | None = None) -> Manifest:
    """Write a data set of square pictures, whose rows an ingest shuffles. For tests that are `alone`, or have Ray."""
    raw = Folder(f"{out.url}-raw")
    for i, picture in enumerate(pixels):
        name = f"{i:05d}.png" if labels is None else f"{labels[i]}/{i:05d}.png"
        raw.put(name, encode(picture, "png"))
    side, _, channels = pixels.shape[1:]
    return ingest(IngestPlan.make(raw, out, IngestConfig(side=side, channels=channels, shard_rows=64)))
