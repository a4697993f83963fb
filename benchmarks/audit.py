"""What does an audit cost: time and memory, beside the matrix product that is in it?

    python benchmarks/audit.py --folder /tmp/brickyard-audit

Made-up pictures of 32 × 32 × 3 (smooth, with noise; a tenth of the samples are training pictures with a little noise)
are audited in pixels with all defaults: the nearest 50 training pictures of each sample and of each of the control, and
the nearest other sample. Told: seconds of the whole job in a warm cluster, the peak of what all processes hold (PSS: a
page that n share counts 1/n), whether the copies were found; and beside it, on one thread, the seconds of the bare
matrix product of the same size, and of scikit-learn's NearestNeighbors on a tenth of the samples, times ten.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from benchmarks.loaders.tree import Watch, pss_bytes
from pipelines.audit import audit_job
from pipelines.audit_config import AuditJob
from pipelines.cluster import cluster
from pipelines.manifest import Manifest
from pipelines.shards import PICTURES, ShardWriter
from pipelines.storage import Folder
from tests.pipelines.sample_sets import write_samples

SIDE, K = 32, 50


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure an audit of made-up pictures."""

    folder: Path
    """Where the pictures are written; what an earlier run left there is removed."""
    samples: int = 5_000
    images: int = 50_000
    peers: bool = True
    """Measure the bare product and scikit-learn as well."""


def pictures(n: int, seed: int) -> NDArray[np.uint8]:
    """Return smooth pictures with a little noise, uint8 [n, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (n, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return (rough // 2 + rng.integers(0, 64, (n, SIDE, SIDE, 3), np.uint8) + 32).astype(np.uint8)


def write_data(folder: Folder, images: NDArray[np.uint8]) -> Manifest:
    writer = ShardWriter(folder, "part", PICTURES, 10_000, 128, "none")
    for i, image in enumerate(images):
        writer.add(image.tobytes(), None, str(i))
    manifest = Manifest(
        side=SIDE, channels=3, encoding="raw", row_group_rows=128, labels=[], label_counts=[], quarantined=0,
        source="made up", shards=writer.close(),
    )  # fmt: skip
    manifest.save(folder)
    return manifest


def main(settings: Settings) -> None:
    shutil.rmtree(settings.folder, ignore_errors=True)
    root = Folder(str(settings.folder))
    images, drawn = pictures(settings.images, 0), pictures(settings.samples, 1)
    copies = settings.samples // 10
    noise = np.random.default_rng(2).integers(0, 9, drawn[:copies].shape, np.uint8)
    drawn[:copies] = images[:: settings.images // copies][:copies] + noise
    manifest = write_data(root / "data", images)
    lineage = {"data_url": (root / "data").url, "data_digest": manifest.digest, "tracking_uri": "none", "position": 0}
    write_samples(root / "samples", drawn, lineage | {"checkpoint": (root / "none").url}, shard_images=250)
    with cluster():
        audit_job(AuditJob(samples=write_samples(root / "warm", drawn[:500], lineage | {"checkpoint": ""}).url))
        idle = pss_bytes(os.getpid())
        with Watch() as watch:
            began = time.perf_counter()
            told = audit_job(AuditJob(samples=(root / "samples").url))
            seconds = time.perf_counter() - began
    found = told["of_samples"]["copies"]["count"]
    others, theirs = told["of_control"]["n"], told["of_control"]["copies"]["count"]
    print(
        f"{settings.samples:,} samples and {others:,} others × {settings.images:,} images, k = {K}: {seconds:.1f} s, "
        f"{watch.peak / 1e6:,.0f} MB at the peak, {idle / 1e6:,.0f} MB of them before; "
        f"{found} copies of {copies} found, {theirs} in the control",
        flush=True,
    )
    if settings.peers:
        peers(drawn, images, settings.samples + told["of_control"]["n"])


def peers(drawn: NDArray[np.uint8], images: NDArray[np.uint8], asked: int) -> None:
    few, data = (x.reshape(len(x), -1) / 255.0 for x in (drawn[: len(drawn) // 10], images))
    with threadpool_limits(1):
        began = time.perf_counter()
        for start in range(0, len(data), 5000):
            few @ data[start : start + 5000].T
        product = (time.perf_counter() - began) * asked / len(few)
        began = time.perf_counter()
        NearestNeighbors(n_neighbors=K, algorithm="brute").fit(data).kneighbors(few)
        peer = (time.perf_counter() - began) * asked / len(few)
    print(f"on one thread: the product alone {product:.1f} s, scikit-learn {peer:.1f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
