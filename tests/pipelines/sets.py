"""Sets of pictures to be compared, written as the jobs write them but without a network or a cluster."""

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import encode
from pipelines.ingest import ingest
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.manifest import Manifest
from pipelines.storage import Folder


def write_samples(
    out: Folder, pixels: np.ndarray, labels: np.ndarray | None = None, shard: int = 100, **lineage: object
) -> Folder:
    """Write a finished set of samples, uint8 [n, H, W, C], of seeds from 0."""
    files = []
    labels = np.full(len(pixels), -1) if labels is None else labels
    for start in range(0, len(pixels), shard):
        here = pixels[start : start + shard]
        table = pa.table(
            {
                "seed": pa.array(range(start, start + len(here)), pa.int64()),
                "label": pa.array(labels[start : start + shard], pa.int32()),
                "image": pa.array([encode(picture, "png") for picture in here], pa.binary()),
            }
        )
        buffer, name = io.BytesIO(), f"part-{start // shard:06d}.parquet"
        pq.write_table(table, buffer)
        out.put(name, buffer.getvalue())
        files.append({"name": name, "images": len(here), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    n, height, width, channels = pixels.shape
    known = {"data_url": "", "data_digest": "", "tracking_uri": "none", "tracking_run": ""} | lineage
    about = {"seeds": [0, n - 1], "shape": [channels, height, width], "lineage": known, "files": files}
    out.put("manifest.json", json.dumps(about).encode())
    out.put("_SUCCESS", b"")
    return out


def write_data(out: Folder, pixels: np.ndarray, labels: np.ndarray | None = None) -> Manifest:
    """Write a data set of square pictures, whose rows an ingest shuffles. For tests that are `alone`, or have Ray."""
    raw = Folder(f"{out.url}-raw")
    for i, picture in enumerate(pixels):
        name = f"{i:05d}.png" if labels is None else f"{labels[i]}/{i:05d}.png"
        raw.put(name, encode(picture, "png"))
    side, _, channels = pixels.shape[1:]
    return ingest(IngestPlan.make(raw, out, IngestConfig(side=side, channels=channels, shard_rows=64)))
