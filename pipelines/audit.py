"""Are samples copies? Their nearest training images, and each other's, as a report, a table and a picture.

``audit.parquet`` has a row for each sample, ``pairs.png`` the closest pairs, and ``audit.json``, written last, what is
concluded: :mod:`pipelines.audit_report` says how.
"""

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import audit_report
from pipelines.audit_config import AuditJob
from pipelines.audit_pictures import Pair, closest_samples, pairs_figure, pairs_of_samples
from pipelines.audit_plan import AuditPlan, Control, plan_audit
from pipelines.audit_search import PIECE_IMAGES, DataBlocks, Read, ask, block_rows, search
from pipelines.champion import record_file, record_score
from pipelines.cluster import cluster
from pipelines.errors import ConfigurationError, DataError
from pipelines.images import Pixels
from pipelines.mlflow_door import to_record_at
from pipelines.picture_sets import DataPictures
from pipelines.sample_set import SampleSet

REPORT, TABLE, PAIRS = "audit.json", "audit.parquet", "pairs.png"
PART_ROWS = 256
"""Pictures of the control that one task makes into vectors."""

log = logging.getLogger("brickyard.audit")


@dataclass(frozen=True)
class ReadControl:
    """Reads a part of the control."""

    data: DataPictures
    control: Control

    def __call__(self, part: int) -> Read:
        here = slice(part * PART_ROWS, (part + 1) * PART_ROWS)
        rows, own = self.control.row[here], self.control.own[here]
        found = list(self.data.pieces(rows, PIECE_IMAGES))
        usable = np.concatenate([row for row, _ in found])
        none = np.full(len(usable), -1)
        return Read(np.concatenate([pixels for _, pixels in found]), own[np.isin(rows, usable)], none, none)


@dataclass(frozen=True)
class ReadSamples:
    """Reads a shard of samples."""

    samples: SampleSet

    def __call__(self, part: int) -> Read:
        found = self.samples.read(part)
        pixels = self.samples.decoded(found.image, self.samples.names[part])
        return Read(pixels, np.full(len(pixels), -1), found.seed, found.label)


@dataclass(frozen=True)
class Findings:
    """What was found of each sample, in the order of the seeds."""

    seed: NDArray[np.int64]
    label: NDArray[np.int64]
    judged: audit_report.Judged
    twins: audit_report.Twins
    control: audit_report.Judged | None
    rows: int
    """Training images that they were compared with."""


def find(plan: AuditPlan) -> Findings:
    """Compare all samples, and the control, with all training images, and the samples with each other."""
    features, threshold, data, samples = plan.job.features, plan.job.threshold, plan.data, plan.samples
    with cluster():
        drawn, seed, label = ask(ReadSamples(samples), len(samples.names), samples.count, features)
        if drawn.count != samples.count:
            raise DataError(f"{samples.folder.url} has {drawn.count} samples; its manifest says {samples.count}")
        images = len(plan.control.row)
        control, *_ = ask(ReadControl(data, plan.control), -(-images // PART_ROWS), images, features)
        asked = drawn + control
        size = block_rows(data.n, asked.dimensions * (1 + plan.mirrored))
        blocks = DataBlocks(data, features, asked.dimensions, size, plan.held, plan.mirrored)
        log.info("audit: %d samples, %d other pictures, %d blocks of %d images", drawn.count,
                 asked.count - drawn.count, blocks.count, size)  # fmt: skip
        found, rows = search(asked, blocks, blocks.count, plan.k, features)
        among, _ = search(drawn, drawn, len(drawn.parts), 1)
    if rows < 3:
        raise DataError(f"{data.folder.url} has {rows} images that can be used; three are needed")
    n = drawn.count
    judged = audit_report.judge(found.of(slice(n)), threshold)
    others = audit_report.judge(found.of(slice(n, None)), threshold) if asked.count > n else None
    return Findings(seed, label, judged, audit_report.judge_twins(among, judged, threshold), others, rows)


def audit(plan: AuditPlan) -> dict[str, Any]:
    """Write the audit, unless it is there, and return its report.

    Raises:
        ConfigurationError: if the folder holds another audit.
        DataError: if something cannot be read.
    """
    if (there := _present(plan)) is not None:
        return there
    samples = plan.samples
    found = find(plan)
    buffer = io.BytesIO()
    rows = audit_report.table(found.seed, found.label, found.judged, found.twins)
    pq.write_table(rows.replace_schema_metadata({"brickyard": json.dumps(plan.terms)}), buffer)
    files = {TABLE: buffer.getvalue(), PAIRS: _picture(plan, found)}
    for name, data in files.items():
        plan.out.put(name, data)
    report = _report(plan, found) | {
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "terms": plan.terms,
        "lineage": samples.lineage,
    }
    plan.out.put(REPORT, json.dumps(report, indent=1).encode())
    return report


def _present(plan: AuditPlan) -> dict[str, Any] | None:
    """Return the report of this audit if it is there, with all that belongs to it."""
    out = plan.out
    if not out.exists(REPORT):
        return None
    try:
        report = dict(json.loads(out.get(REPORT)))
        terms, files = dict(report["terms"]), dict(report["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out.url}/{REPORT} is no audit: {error!r}; delete it") from error
    for name, mine in plan.terms.items():
        if terms.get(name) != mine:
            raise ConfigurationError(
                f"{out.url} holds another audit: its {name} is {terms.get(name)}, this job's is {mine}; give another "
                f"--out, or delete {REPORT}"
            )
    present = {name: out.get(name) for name in files if out.exists(name)}
    whole = all(name in present and hashlib.sha256(present[name]).hexdigest() == sha for name, sha in files.items())
    return report if whole else None


def _report(plan: AuditPlan, found: Findings) -> dict[str, Any]:
    samples = audit_report.group(found.judged)
    control = found.control and audit_report.group(found.control)
    near = audit_report.share(found.twins.near)
    told: dict[str, Any] = {
        "samples": plan.samples.folder.url,
        "samples_n": len(found.seed),
        "seeds": plan.samples.about["seeds"],
        "reference": plan.data.folder.url,
        "reference_n": found.rows,
        "same_data_as_trained_on": plan.data.digest == plan.samples.lineage.get("data_digest"),
        "of_samples": samples,
        "of_control": control,
        "excess_share": samples["copies"]["share"] - control["copies"]["share"] if control else None,
        "nearer_than_control": (
            audit_report.nearer(found.judged.distance, found.control.distance) if found.control else None
        ),
        "near_duplicates": near | {"identical": int((found.twins.same >= 0).sum())},
        "notes": plan.notes,
    }
    labels = audit_report.by_label(found.label, found.judged, found.twins, plan.labels)
    return told | ({"by_label": labels} if labels else {})


def _picture(plan: AuditPlan, found: Findings) -> bytes:
    """Draw the closest pairs: samples beside their training images, and beside each other."""
    judged, seed = found.judged, found.seed
    closest = np.argsort(judged.ratio, kind="stable")[: plan.job.pairs].tolist()
    alike = closest_samples(found.twins, -(-plan.job.pairs // 3))
    drawn = _pictures_of(plan.samples, sorted({*closest, *(i for one in alike for i in one[:2])}))
    read = plan.data.pieces(np.unique(judged.row[closest]), PIECE_IMAGES)
    trained = {row: picture for here, some in read for row, picture in zip(here.tolist(), some, strict=True)}
    with_data = [
        Pair(
            drawn[i], trained[int(judged.row[i])][:, :: -1 if judged.mirrored[i] else 1],
            f"seed {seed[i]} | row {judged.row[i]}{' mirrored' if judged.mirrored[i] else ''}",
            f"d {judged.distance[i]:.3g}, r {judged.ratio[i]:.2f}", bool(judged.copy[i]),
        )
        for i in closest
    ]  # fmt: skip
    return pairs_figure(with_data, pairs_of_samples(alike, seed, drawn))


def _pictures_of(samples: SampleSet, index: list[int]) -> dict[int, Pixels]:
    """Return the pictures of some samples, by their place in the set."""
    found: dict[int, Pixels] = {}
    start = 0
    for part, file in enumerate(samples.about["files"]):
        inside = [i for i in index if start <= i < start + file["images"]]
        if inside:
            pixels = samples.pixels(part)
            found |= {i: pixels[i - start] for i in inside}
        start += file["images"]
    return found


def audit_job(job: AuditJob) -> dict[str, Any]:
    """Do what the job says, and write the shares to the MLflow run that trained the network.

    Raises:
        ConfigurationError: if the folder holds another audit, or it is not on record what to compare with.
        DataError: if the samples or the data set cannot be used.
    """
    plan = plan_audit(job)
    lineage = plan.samples.lineage
    uri = to_record_at(str(lineage.get("tracking_uri", "none")), job.tracking.uri)
    report = audit(plan)
    shares = {
        "copied_share": report["of_samples"]["copies"]["share"],
        "copied_share_control": report["of_control"] and report["of_control"]["copies"]["share"],
        "near_duplicate_share": report["near_duplicates"]["share"],
    }
    run = str(lineage.get("tracking_run", ""))
    measured_on = lineage | {"data_digest": plan.data.digest, "data_url": plan.data.folder.url}
    values = {name + plan.suffix: value for name, value in shares.items() if value is not None}
    taken = [record_score(uri, run, name, value, measured_on) for name, value in values.items()]
    log.info(
        "audit: %d of %d samples are copies, %d are near-duplicates; see %s/%s",
        report["of_samples"]["copies"]["count"], report["samples_n"], report["near_duplicates"]["count"],
        plan.out.url, PAIRS,
    )  # fmt: skip
    if recorded := all(taken):
        recorded = record_file(uri, run, f"pairs-{lineage['position']}{plan.suffix}.png", plan.out.get(PAIRS))
    return {"audit": f"{plan.out.url}/{REPORT}", "pairs": f"{plan.out.url}/{PAIRS}", **report, "recorded": recorded}


def dry_run(job: AuditJob) -> dict[str, Any]:
    """Return what would be compared, having changed nothing."""
    plan = plan_audit(job)
    return {
        "dry_run": True,
        "audit": plan.out.url,
        "samples": plan.samples.folder.url,
        "samples_n": plan.samples.count,
        "reference": plan.data.folder.url,
        "reference_n": plan.data.n - len(plan.held),
        "is_there": _present(plan) is not None,
        "notes": plan.notes,
        "terms": plan.terms,
    }
