"""Sets of samples as jobs/sample.py leaves them, made of given pictures."""

import hashlib
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import Pixels, encode
from pipelines.storage import Folder


def write_samples(
    folder: Folder, pixels: Pixels, lineage: dict[str, Any], first: int = 0, shard_images: int = 100, labels: Any = None
) -> Folder:
    """Write pictures [n, H, W, C] as the samples of the seeds from ``first`` on."""
    files = []
    for start in range(0, len(pixels), shard_images):
        part = pixels[start : start + shard_images]
        label = np.full(len(part), -1) if labels is None else labels[start : start + shard_images]
        table = pa.table(
            {
                "seed": pa.array(range(first + start, first + start + len(part)), pa.int64()),
                "label": pa.array(label, pa.int32()),
                "image": pa.array([encode(picture, "png") for picture in part], pa.binary()),
            }
        ).replace_schema_metadata({"brickyard": json.dumps(lineage)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="none")
        name = f"part-{start // shard_images:06d}.parquet"
        folder.put(name, buffer.getvalue())
        files.append({"name": name, "images": len(part), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()})
    height, width, channels = pixels.shape[1:]
    seeds, shape = [first, first + len(pixels) - 1], [channels, height, width]
    about = {"seeds": seeds, "shape": shape, "lineage": lineage, "files": files}
    folder.put("manifest.json", json.dumps(about).encode())
    folder.put("_SUCCESS", b"")
    return folder
