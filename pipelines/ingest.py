"""Raw images → Parquet shards and a manifest, as a Ray Data job that can be killed and run again.

A part of the source is written by one task, as shards whose names say the part; a record beside them, written after
them, says that it is done. The manifest comes last of all.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pipelines.cluster import node_labels
from pipelines.errors import DataError
from pipelines.ingest_plan import IngestConfig, IngestPlan
from pipelines.labels import sorted_labels
from pipelines.manifest import Manifest
from pipelines.parts import (
    DIGESTS,
    RECORDS,
    DigestPart,
    Duplicate,
    Part,
    Record,
    WritePart,
    do,
    find_duplicates,
    result,
)
from pipelines.retries import retries
from pipelines.storage import Folder

QUARANTINE, DUPLICATES = "quarantine.jsonl", "duplicates.jsonl"
MAX_LABELS = 65_536

log = logging.getLogger("brickyard.ingest")


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    """Make a data set of raw images: Parquet shards and a manifest."""

    source: str
    """Folder or URL of PNG, JPEG or WebP files, of Parquet files that hold such, or of WebDataset tars."""
    out: str
    """Folder or URL for the data set."""
    node_labels: tuple[str, ...] = ()
    """Ray's labels, KEY=VALUE, of the nodes that do it, such as CPU-only ones; none: any node."""
    ingest: IngestConfig = field(default_factory=IngestConfig)

    def __post_init__(self) -> None:
        self.wanted_labels  # noqa: B018  (it checks)

    @property
    def wanted_labels(self) -> dict[str, str]:
        """`node_labels` by key."""
        return node_labels("node_labels", self.node_labels)


def ingest(plan: IngestPlan, wanted_labels: dict[str, str] | None = None) -> Manifest:
    """Make the data set that is planned, or finish it, or find it finished.

    Args:
        plan: what is made of which files.
        wanted_labels: labels that a node must have for the tasks to run there; any node if there are none.

    Raises:
        ConfigurationError: if its folder holds an ingest of other files, or of another configuration; or if no node
            has the labels, nor ever will.
        DataError: if there are too many bad images, or storage refuses.
    """
    out, source, before = plan.out, plan.source, retries()
    if finished := plan.finished():
        log.info("ingest: %s is complete; nothing to do", out.url)
        return finished
    plan.begin()
    twice: list[Duplicate] = []
    if plan.config.drop_duplicates:
        do(_missing(plan, DIGESTS, {}), DigestPart(source, out), True, wanted_labels)
        told = [json.loads(out.get(result(DIGESTS, number))) for number in range(plan.parts)]
        lost = plan.behind({number for number, part in enumerate(told) if part["broken"]})
        digests = [[] if number in lost else part["found"] for number, part in enumerate(told)]
        twice = find_duplicates(digests, by_path=source.kind == "files")
    dropped: dict[int, set[int]] = {}
    for duplicate in twice:
        dropped.setdefault(duplicate.part, set()).add(duplicate.place)
    # In place nothing is fetched: that is no work for a cluster.
    on_cluster = plan.config.encoding != "in-place"
    do(_missing(plan, RECORDS, dropped), WritePart(source, out, plan.form), on_cluster, wanted_labels)
    manifest = _finish(plan, twice)
    if retries() > before:
        log.info("ingest: storage was asked again %d times so far", retries())
    return manifest


def _missing(plan: IngestPlan, results: str, dropped: dict[int, set[int]]) -> list[list[Part]]:
    """Return the parts whose result is not there yet, in runs."""
    done = {f"{results}/{name}" for name in (plan.out / results).names()}
    missing = [number for number in range(plan.parts) if result(results, number) not in done]
    log.info("ingest: %d files in %d parts, %d still to do for %s", len(plan.files), plan.parts, len(missing), results)
    return [
        [plan.part(number, frozenset(dropped.get(number, ()))) for number in numbers] for numbers in plan.runs(missing)
    ]


def _finish(plan: IngestPlan, twice: list[Duplicate]) -> Manifest:
    read = TypeAdapter(Record).validate_json
    all_records = [read(plan.out.get(result(RECORDS, number))) for number in range(plan.parts)]
    lost = plan.behind({number for number, record in enumerate(all_records) if record.broken})
    records = [record for number, record in enumerate(all_records) if number not in lost]
    bad = [entry for record in records for entry in record.bad]
    shards = [shard for record in records for shard in record.shards]
    for name, lines in ((QUARANTINE, bad), (DUPLICATES, [{"path": d.path, "same_as": d.same_as} for d in twice])):
        if lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            plan.out.put(name, text.encode())
            log.warning("%d images are left out; see %s/%s", len(lines), plan.out.url, name)
    _check_share(plan, bad, sum(shard.rows for shard in shards), sum(record.broken for record in records))
    counts: Counter[str] = sum((Counter(record.label_counts) for record in records), Counter())
    labels = sorted_labels(set(counts)) if plan.labels is None else plan.labels
    if len(labels) > MAX_LABELS:
        raise DataError(
            f"{plan.source.folder.url} has {len(labels)} different labels, such as {labels[-1]!r}: are these captions? "
            "Set ingest.labels to none, and give another folder"
        )
    manifest = Manifest(
        side=plan.form.side,
        channels=plan.form.channels,
        encoding=plan.form.encoding,
        row_group_rows=plan.form.row_group_rows,
        labels=labels,
        label_counts=[counts[label] for label in labels],
        quarantined=len(bad),
        duplicates=len(twice),
        source=plan.source.folder.url,
        shards=shards,
    )
    manifest.save(plan.out)
    return manifest


def _check_share(plan: IngestPlan, bad: list[dict[str, str]], good: int, broken: int) -> None:
    """Raise DataError if there are no images, or if too many, or too many Parquet files or tars, are unusable."""
    if not good and not bad:
        raise DataError(
            f"no images in {len(plan.files)} files of kind {plan.source.kind} below {plan.source.folder.url}; check "
            "what they hold, or the URL"
        )
    share = max(len(bad) / max(len(bad) + good, 1), broken / len(plan.files))
    if good and share <= plan.config.max_bad_share:
        return
    files = broken / len(plan.files) == share
    what = f"{broken} of {len(plan.files)} files" if files else f"{len(bad)} of {len(bad) + good} images"
    raise DataError(
        f"{what} are unusable, more than ingest.max_bad_share = {plan.config.max_bad_share} allows; the first: "
        f"{bad[0]['path']}: {bad[0]['reason']}; raise the share, or mend the files that {plan.out.url}/{QUARANTINE} "
        "lists and ingest into another folder"
    )


def ingest_job(job: IngestJob) -> dict[str, Any]:
    """Do what the job says; return where the data set is and what is in it."""
    before = retries()
    manifest = ingest(IngestPlan.make(Folder(job.source), Folder(job.out), job.ingest), job.wanted_labels)
    return {
        "data": Folder(job.out).url,
        "images": manifest.rows,
        "quarantined": manifest.quarantined,
        "duplicates": manifest.duplicates,
        "labels": dict(zip(manifest.labels, manifest.label_counts, strict=True)),
        "shards": len(manifest.shards),
        "row_group_rows": manifest.row_group_rows,
        "bytes": sum(shard.size_bytes for shard in manifest.shards),
        "digest": manifest.digest,
        "storage_retries": retries() - before,
    }


def dry_run(job: IngestJob) -> dict[str, Any]:
    """Return what the job would do, having listed the source and changed nothing."""
    plan = IngestPlan.make(Folder(job.source), Folder(job.out), job.ingest)
    return {
        "dry_run": True,
        "source_kind": plan.source.kind,
        "files": len(plan.files),
        "source_bytes": sum(file.size_bytes for file in plan.files),
        "images": plan.images,
        "labels": plan.labels,
        "parts": plan.parts,
        "row_group_rows": plan.form.row_group_rows,
        "complete": plan.complete,
        "data": plan.out.url,
    }
