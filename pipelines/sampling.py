"""Seeds → samples, exactly once, as a Ray batch job.

Shard i is a fixed range of seeds under a fixed name, written by one put: a job that is killed and fired again writes
the shards that are missing and no other, and the pixels of a seed do not depend on which attempt drew it.
All of it is read back before ``manifest.json`` and ``_SUCCESS``, which come last.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy

from pipelines import metrics, sample_shards
from pipelines.cluster import cluster
from pipelines.draw_shard import DrawShard
from pipelines.errors import BrickyardError, DataError
from pipelines.firing import Slot, due, fire
from pipelines.fit import pixels_to_x_0
from pipelines.images import Pixels, encode
from pipelines.manifest import Manifest
from pipelines.pictures import contact_sheet, strip
from pipelines.progress import SampleProgress
from pipelines.read_back import ReadBack, verify
from pipelines.sample_config import SampleJob
from pipelines.sample_plan import CLAIM, SamplePlan, check_claim, check_whole, claim, plan_samples
from pipelines.sample_record import recorded
from pipelines.sample_set import MANIFEST, SUCCESS
from pipelines.storage import Folder
from pipelines.tracking import Tracker

SHEET, STRIP = "contact-sheet.png", "strip.png"
SHEET_IMAGES = 100
MOST_TOGETHER = 4
"""Shards that an actor is given at a time: it writes one while it draws the next."""
ROUNDS = 3
"""Of drawing what is missing or damaged, after which storage is not to be trusted."""

log = logging.getLogger("brickyard.sampling")


def draw_samples(
    plan: SamplePlan,
    slot: Slot | None = None,
    record: Callable[[], AbstractContextManager[Tracker]] = lambda: nullcontext(Tracker()),
) -> dict[str, Any]:
    """Write every shard that is missing, read all of them back, then write the pictures, the manifest and ``_SUCCESS``.

    Args:
        plan: what to draw.
        slot: of a schedule, if this is a firing: it is asked before each commit.
        record: opens the record of the job, if there is something to do.

    Returns:
        What was done: counts, seconds and where it is.

    Raises:
        ConfigurationError: if the folder holds other samples.
        DataError: if storage refuses, or does not keep what is written.
        TryAgainError: if another job has just begun there with a newer network, or if the slot is not
            this job's any more.
    """
    out, began = plan.out, time.perf_counter()
    claim(plan)
    present = set(out.names())
    missing = [shard for shard in range(plan.shards) if sample_shards.shard_name(shard) not in present]
    summary = {"samples": out.url, "images": len(plan.seeds), "drawn_now": 0}
    if missing or SUCCESS not in present:
        with record() as tracker:
            drawn = _draw_and_finish(plan, missing, slot, tracker)
            seconds = time.perf_counter() - began
            rates = {"images_per_s": drawn / seconds, "seconds_per_image": seconds / drawn} if drawn else {}
            tracker.metrics({**rates, "seconds": seconds, "drawn_now": drawn}, len(plan.seeds))
        summary |= {"drawn_now": drawn, **{name: round(rate, 6) for name, rate in rates.items()}}
        summary |= {"see": tracker.see} if tracker.run_id else {}
    log.info("%d samples, %d of them drawn now, in %s; see %s", len(plan.seeds), summary["drawn_now"], out.url, SHEET)
    return summary | {
        "seconds": round(time.perf_counter() - began, 1),
        "contact_sheet": f"{out.url}/{SHEET}",
        "strip": f"{out.url}/{STRIP}",
        "lineage": plan.lineage,
    }


def _draw_and_finish(plan: SamplePlan, missing: list[int], slot: Slot | None, tracker: Tracker) -> int:
    """Draw what is missing, read everything back, draw what is damaged, and finish. Return how many were drawn."""
    log.info("sample: %d seeds in %d shards, %d to draw", len(plan.seeds), plan.shards, len(missing))
    drawn, files = 0, dict[int, dict[str, Any]]()
    present = sorted(set(range(plan.shards)).difference(missing))
    check = slot.check if slot else lambda: None
    read = ReadBack(
        plan.out, plan.seeds, plan.draw.shard_images, plan.trained.checkpoint.shape, plan.also, plan.trained.labels
    )
    # The slots of a schedule are many; Prometheus hears of the schedule.
    name = plan.out.url.split("/")[-2] if slot else plan.out.name
    with cluster(), metrics.at_work(name):
        for attempt in range(ROUNDS):
            rows = chain(_draw(plan, missing, attempt > 0, read, slot, name), read.all(present))
            missing, present = [], []
            for row in rows:
                drawn += row.get("images", 0)
                if row["wrong"]:
                    log.warning("%s: it is drawn again", row["wrong"])
                    missing.append(row["shard"])
                else:
                    files[row["shard"]] = json.loads(row["found"])
            if not missing:
                break
        else:
            raise DataError(f"{plan.out.url} does not keep what is written there: {len(missing)} shards are damaged")
        _finish(plan, [files[shard] for shard in range(plan.shards)], check, tracker)
    return drawn


def _draw(
    plan: SamplePlan, shards: list[int], anew: bool, read: ReadBack, slot: Slot | None, name: str
) -> Iterator[dict[str, Any]]:
    """Draw shards, those that are there too if ``anew``, and read each back while the next ones are drawn.

    Prometheus knows them by a name.
    """
    if not shards:
        return
    actors = min(plan.draw.actors, len(shards))
    together = max(1, min(MOST_TOGETHER, len(shards) // (4 * actors)))
    dataset = (
        ray.data.from_items([{"id": shard} for shard in shards], override_num_blocks=-(-len(shards) // together))
        .map_batches(
            DrawShard,
            fn_constructor_args=(plan, anew, slot.fence if slot else None),
            batch_size=together,
            compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_gpus=1 if plan.draw.use_gpu else 0,
        )
        .map(read, num_cpus=0)  # so that there is room for it, whatever the actors take
    )
    left = sum(len(plan.shard_seeds(shard)) for shard in shards)
    progress = SampleProgress(left)
    metrics.SAMPLES_LEFT.set(name, left)
    for row in dataset.iter_rows():
        if slot:
            slot.check()
        progress.update(row["images"])
        left -= row["images"]
        metrics.SAMPLES.add(name, row["images"])
        metrics.SAMPLES_LEFT.set(name, left)
        yield row
    metrics.SAMPLES_LEFT.set(name, 0)  # what an actor had written before it died is not told again


def _finish(plan: SamplePlan, files: list[dict[str, Any]], check: Callable[[], None], tracker: Tracker) -> None:
    check()
    out = plan.out
    names = [sample_shards.shard_name(i) for i in range(-(-SHEET_IMAGES // plan.draw.shard_images))][: len(files)]
    sheet = contact_sheet(sample_shards.read_samples(out, names, plan.trained.checkpoint.shape)[:SHEET_IMAGES])
    out.put(SHEET, encode(sheet, "png"))
    tracker.picture(sheet, "samples", len(plan.seeds))
    try:
        strip_of_one = encode(draw_strip(plan), "png")
        out.put(STRIP, strip_of_one)
        tracker.file(STRIP, strip_of_one)
    except BrickyardError as error:
        log.warning("no strip, since the training data cannot be read: %s", error)
    about = {
        "seeds": [plan.seeds.start, plan.seeds.stop - 1],
        "shard_images": plan.draw.shard_images,
        "also": list(plan.also),
        "shape": list(plan.trained.checkpoint.shape),
        "labels": plan.trained.labels,
        "lineage": plan.lineage,
        "recorded": {"uri": tracker.uri, "run": tracker.run_id},
        "files": files,
    }
    tracker.file("lineage.json", json.dumps(plan.lineage, indent=1).encode())
    check()
    out.put(MANIFEST, json.dumps(about, indent=1).encode())
    out.put(SUCCESS, b"")


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


def sample_job(job: SampleJob) -> dict[str, Any]:
    """Do what the job says: draw, or verify."""
    if job.verify:
        return verify(Folder(job.out))
    if job.firing.slot:
        return fire(job.firing, Folder(job.out), partial(_sample_slot, job))
    plan = plan_samples(job)
    return draw_samples(plan, record=partial(recorded, job, plan))


def _sample_slot(job: SampleJob, slot: Slot) -> dict[str, Any]:
    """Draw the samples of a slot of a schedule."""
    seeds = slot.seeds(job.seed_range)
    mine = replace(
        job, out=slot.folder.url, seeds=f"{seeds.start}-{seeds.stop - 1}", firing=replace(job.firing, slot=slot.id)
    )
    plan = plan_samples(mine)
    summary = draw_samples(plan, slot, partial(recorded, mine, plan))
    slot.links.update({name: str(summary[name]) for name in ("see", "contact_sheet") if name in summary})
    return summary


def dry_run(job: SampleJob) -> dict[str, Any]:
    """Return what the job would do, having verified the checkpoint and changed nothing."""
    if job.firing.slot:
        slots = due(job.firing, Folder(job.out))
        with tempfile.TemporaryDirectory() as temporary:
            plan = plan_samples(replace(job, out=f"{temporary}/out"), keep=Folder(temporary))
        return {"dry_run": True, "slots": slots, "images": len(plan.seeds), "lineage": plan.lineage}
    with tempfile.TemporaryDirectory() as temporary:
        plan = plan_samples(job, keep=Folder(temporary))
    present = set(plan.out.names())
    check_whole(plan.out)
    if CLAIM in present:
        check_claim(plan)
    missing = [shard for shard in range(plan.shards) if sample_shards.shard_name(shard) not in present]
    return {
        "dry_run": True,
        "images": len(plan.seeds),
        "shards": plan.shards,
        "shards_to_draw": len(missing),
        "network_evaluations": sum(len(plan.shard_seeds(shard)) for shard in missing) * plan.draw.evaluations,
        "samples": plan.out.url,
        "lineage": plan.lineage,
    }
