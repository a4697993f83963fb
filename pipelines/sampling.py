"""Seeds → samples, exactly once, as a Ray batch job.

Shard i is a fixed range of seeds under a fixed name, written by one put: a job that is killed and fired again writes
the shards that are missing and no other, and the pixels of a seed do not depend on which attempt drew it.
``manifest.json`` and ``_SUCCESS`` come last.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from ray.data import ActorPoolStrategy

from models.network import EpsNetwork
from models.samplers import sample
from pipelines.cluster import cluster
from pipelines.config import SampleJob
from pipelines.errors import DataError
from pipelines.fit import pixels_to_x_0, x_0_to_pixels
from pipelines.images import Pixels, decode, encode
from pipelines.manifest import Manifest
from pipelines.pictures import contact_sheet, strip
from pipelines.sample_plan import SamplePlan, check_claim, identity, plan_samples
from pipelines.storage import Folder

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
SHEET, STRIP = "contact-sheet.png", "strip.png"
SHEET_IMAGES = 100
AGAIN = "delete that file and run the sampling job again"

log = logging.getLogger("brickyard.sampling")


class DrawShard:
    """The actor: it loads the network once, then draws shard after shard."""

    def __init__(self, plan: SamplePlan) -> None:
        torch.set_num_threads(1)
        self.plan = plan
        self.device = torch.device("cuda" if plan.draw.use_gpu else "cpu")
        self.schedule = plan.trained.schedule()

    @cached_property
    def network(self) -> EpsNetwork:
        # Not in the constructor: what fails there is told as a dead actor, and tried again.
        return self.plan.trained.network(averaged=self.plan.draw.weights == "ema", std=self.plan.draw.ema_std).to(
            self.device
        )

    def __call__(self, rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for shard in rows["id"].tolist():
            began = time.perf_counter()
            seeds = self.plan.shard_seeds(shard)
            pixels = np.concatenate([self._draw(batch) for batch in _batches(seeds, self.plan.draw.batch_images)])
            data = self._parquet(seeds, pixels)
            self.plan.out.put(self.plan.shard_name(shard), data)
            yield {"shard": [shard], "images": [len(seeds)], "seconds": [time.perf_counter() - began]}

    def _draw(self, seeds: range) -> Pixels:
        draw, size = self.plan.draw, len(seeds)
        # Batches are always full: a convolution may round differently in a batch of another size.
        full = torch.arange(seeds.start, seeds.start + draw.batch_images, device=self.device)
        trained = self.plan.trained
        eps_theta = trained.eps_theta(self.network, self.plan.labels(full), draw.guidance)
        with torch.inference_mode():
            x_0 = sample(
                draw.walk, eps_theta, self.schedule, full, trained.checkpoint.shape, draw.steps, draw.clip, draw.spacing
            )
        return x_0_to_pixels(x_0)[:size].cpu().numpy()

    def _parquet(self, seeds: range, pixels: Pixels) -> bytes:
        table = pa.table(
            {
                "seed": pa.array(seeds, pa.int64()),
                "label": pa.array(self.plan.labels(torch.tensor(seeds)).tolist(), pa.int32()),
                "image": pa.array([encode(picture, "png") for picture in pixels], pa.binary()),
            }
        ).replace_schema_metadata({"brickyard": json.dumps(self.plan.lineage)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="none")  # PNG is compressed
        return buffer.getvalue()


def _batches(seeds: range, size: int) -> Iterator[range]:
    return (seeds[start : start + size] for start in range(0, len(seeds), size))


def draw_samples(plan: SamplePlan) -> dict[str, Any]:
    """Write every shard that is missing, then the pictures, the manifest and ``_SUCCESS``.

    Returns:
        What was done: counts, seconds and where it is.

    Raises:
        ConfigurationError: if the folder holds other samples.
        DataError: if storage refuses, or a shard does not hold what it must.
    """
    out, began = plan.out, time.perf_counter()
    if not out.create("plan.json", json.dumps(identity(plan), indent=1).encode()):
        check_claim(plan)
    present = set(out.names())
    missing = [shard for shard in range(plan.shards) if plan.shard_name(shard) not in present]
    drawn = 0
    if missing:
        log.info("sample: %d seeds in %d shards, %d to draw", len(plan.seeds), plan.shards, len(missing))
        with cluster():
            for row in _draw_missing(plan, missing).iter_rows():
                drawn += row["images"]
                log.info("sample: shard %d, %d images in %.1f s", row["shard"], row["images"], row["seconds"])
    seconds = time.perf_counter() - began
    if missing or SUCCESS not in present:
        _finish(plan)
    return {
        "samples": out.url,
        "images": len(plan.seeds),
        "drawn_now": drawn,
        "images_per_s": round(drawn / seconds, 1) if drawn else 0.0,
        "seconds": round(seconds, 1),
        "contact_sheet": f"{out.url}/{SHEET}",
        "strip": f"{out.url}/{STRIP}",
        "lineage": plan.lineage,
    }


def _draw_missing(plan: SamplePlan, missing: list[int]) -> ray.data.Dataset:
    actors = min(plan.draw.actors, len(missing))
    return ray.data.from_items([{"id": shard} for shard in missing], override_num_blocks=len(missing)).map_batches(
        DrawShard,
        fn_constructor_args=(plan,),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        num_gpus=1 if plan.draw.use_gpu else 0,
    )


def _finish(plan: SamplePlan) -> None:
    out = plan.out
    files = [_read_shard(plan, shard) for shard in range(plan.shards)]
    first = read_samples(out, [plan.shard_name(0)], plan.trained.checkpoint.shape)[:SHEET_IMAGES]
    out.put(SHEET, encode(contact_sheet(first), "png"))
    try:
        out.put(STRIP, encode(draw_strip(plan), "png"))
    except DataError as error:
        log.warning("no strip, since the training data cannot be read: %s", error)
    about = {
        "seeds": [plan.seeds.start, plan.seeds.stop - 1],
        "shape": list(plan.trained.checkpoint.shape),
        "lineage": plan.lineage,
        "files": files,
    }
    out.put(MANIFEST, json.dumps(about, indent=1).encode())
    out.put(SUCCESS, b"")


def _read_shard(plan: SamplePlan, shard: int) -> dict[str, Any]:
    """Read a shard back: its seeds are the ones that are due, and its digest goes into the manifest."""
    name = plan.shard_name(shard)
    data = plan.out.get(name)
    try:
        seeds = pq.read_table(io.BytesIO(data), columns=["seed"])["seed"].to_pylist()
    except pa.ArrowInvalid as error:
        raise DataError(f"{plan.out.url}/{name} is damaged: {error}; delete it and run again") from error
    if seeds != list(plan.shard_seeds(shard)):
        raise DataError(f"{plan.out.url}/{name} does not hold the seeds that it must; delete it and run again")
    return {"name": name, "images": len(seeds), "sha256": hashlib.sha256(data).hexdigest()}


def read_samples(folder: Folder, names: list[str], shape: tuple[int, int, int]) -> Pixels:
    """Read the pictures of sample shards; ``shape`` is [C, H, W] and the result uint8 [n, H, W, C]."""
    channels, height, width = shape
    images = [
        image
        for name in names
        for image in pq.read_table(io.BytesIO(folder.get(name)), columns=["image"])["image"].to_pylist()
    ]
    return decode(images, "png", (height, width, channels))


def draw_strip(plan: SamplePlan) -> Pixels:
    """Draw the strip of the first image of the training data torn down, and of the first seed built up."""
    trained, draw = plan.trained, plan.draw
    if not trained.checkpoint.data_url:
        raise DataError("it is not on record what the network was trained on")
    folder = Folder(trained.checkpoint.data_url)
    x_0 = pixels_to_x_0(torch.tensor(Manifest.load(folder).read(folder, np.array([0]), trained.view).image))
    network = trained.network(averaged=draw.weights == "ema", std=draw.ema_std)
    eps_theta = trained.eps_theta(network, plan.labels(torch.tensor(plan.seeds[:1])), draw.guidance)
    respaced = trained.schedule().respaced(draw.steps, draw.spacing)
    return strip(x_0, eps_theta, trained.schedule(), respaced, draw.walk, plan.seeds.start, draw.clip)


def verify(folder: Folder) -> dict[str, Any]:
    """Prove that a finished folder holds each of its seeds once, as written, and that every picture decodes.

    Raises:
        DataError: at the first thing that is not as it must be.
    """
    if not folder.exists(SUCCESS):
        raise DataError(f"{folder.url} is not finished: it has no {SUCCESS}; run the sampling job again")
    about = json.loads(folder.get(MANIFEST))
    seeds: list[int] = []
    for file in about["files"]:
        data = folder.get(file["name"])
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise DataError(f"{folder.url}/{file['name']} is not what was written: its sha256 differs; {AGAIN}")
        table = pq.read_table(io.BytesIO(data), columns=["seed", "image"])
        channels, height, width = about["shape"]
        decode(table["image"].to_pylist(), "png", (height, width, channels))
        seeds += table["seed"].to_pylist()
    first, last = about["seeds"]
    if seeds != list(range(first, last + 1)):
        raise DataError(f"{folder.url} does not hold each seed of {first}-{last} once; {AGAIN}")
    return {"samples": folder.url, "verified": len(seeds)}


def sample_job(job: SampleJob) -> dict[str, Any]:
    """Do what the job says: draw, or verify."""
    return verify(Folder(job.out)) if job.verify else draw_samples(plan_samples(job))


def dry_run(job: SampleJob) -> dict[str, Any]:
    """Return what the job would do, having verified the checkpoint and changed nothing."""
    plan = plan_samples(job)
    present = set(plan.out.names())
    if "plan.json" in present:
        check_claim(plan)
    missing = [shard for shard in range(plan.shards) if plan.shard_name(shard) not in present]
    return {
        "dry_run": True,
        "images": len(plan.seeds),
        "shards": plan.shards,
        "shards_to_draw": len(missing),
        "network_evaluations": sum(len(plan.shard_seeds(shard)) for shard in missing) * plan.draw.evaluations,
        "samples": plan.out.url,
        "lineage": plan.lineage,
    }
