"""Raw images → Parquet shards and a manifest, as a Ray Data job that can be killed and run again.

The files are listed once, put into a keyed order (so that neighbours in a shard are not of one folder) and cut into
shards of a fixed range of files. A shard is written by one put, under a name that says its range; a record beside it,
written after it, says that it is done. The manifest comes last of all.
"""

import hashlib
import io
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pydantic import TypeAdapter

from models.philox import stream_key
from pipelines.cluster import cluster
from pipelines.errors import ConfigurationError, DataError
from pipelines.images import SUFFIXES, BadImageError, Encoding, encode, read_picture
from pipelines.manifest import NAME, Manifest, Shard
from pipelines.permutation import permute
from pipelines.storage import Folder

FETCH = 64
"""Files that a task holds in memory at once."""
PLAN, RECORDS, QUARANTINE = "ingest.json", "records", "quarantine.jsonl"

log = logging.getLogger("brickyard.ingest")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What the images are made into."""

    side: int = 32
    """Height and width of the training images, in pixels: the middle square, resized."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    encoding: Encoding = "raw"
    """How a shard holds the pixels: raw is the fastest to read, png the smallest. Both lose nothing."""
    shard_rows: int = 8192
    """Files per shard."""
    row_group_rows: int = 128
    """Rows that are read at once, and that stay together until the last shuffle."""
    max_bad_share: float = 0.01
    """Share of files that may be unusable before the ingest gives up."""

    def __post_init__(self) -> None:
        if not 1 <= self.side <= 4096:
            raise ConfigurationError(f"ingest.side is {self.side}; it must lie in 1..4096 pixels")
        for name in ("shard_rows", "row_group_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"ingest.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigurationError(f"ingest.max_bad_share is {self.max_bad_share}; it must lie in 0..1")


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    """Make a data set of raw images: Parquet shards and a manifest."""

    source: str
    """Folder or URL of PNG, JPEG or WebP files; if every file is in a sub-folder, its name is the label."""
    out: str
    """Folder or URL for the data set."""
    ingest: IngestConfig = field(default_factory=IngestConfig)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of the files of one shard."""

    shard: Shard
    label_counts: list[int]
    bad: list[dict[str, str]]
    """Path and reason of each file that could not be used."""


@dataclass(frozen=True)
class IngestPlan:
    """Which file goes into which shard: a function of the listing and the configuration."""

    source: Folder
    out: Folder
    config: IngestConfig
    paths: list[str]
    labels: list[str]
    digest: str

    @staticmethod
    def make(source: Folder, out: Folder, config: IngestConfig) -> "IngestPlan":
        """List the source.

        Raises:
            DataError: if it holds no images, or cannot be listed.
        """
        found = source.find()
        images = [(path, size) for path, size, _ in found if path.lower().endswith(SUFFIXES)]
        if not images:
            raise DataError(
                f"{source.url} holds no images: none of its {len(found)} files ends in {', '.join(SUFFIXES)}; check "
                "the URL, or its rights"
            )
        order = permute(np.arange(len(images)), len(images), stream_key(0, "ingest"))
        parents = [PurePosixPath(path).parent.name for path, _ in images]
        labels = sorted(set(parents)) if all(parents) else []
        form = asdict(config)
        del form["max_bad_share"]  # decides whether to go on, not what is made
        what = json.dumps([form, images])
        return IngestPlan(
            source, out, config, [images[i][0] for i in order], labels, hashlib.sha256(what.encode()).hexdigest()
        )

    @property
    def shards(self) -> int:
        return -(-len(self.paths) // self.config.shard_rows)

    @property
    def complete(self) -> bool:
        """Whether the data set is there already."""
        return self.out.exists(NAME)

    def finished(self) -> Manifest | None:
        """Return the manifest of the data set if it is there already."""
        return Manifest.load(self.out) if self.complete else None

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:06d}.parquet"


@dataclass(frozen=True)
class WriteShard:
    """The task: the number of a shard to the shard and its record in storage."""

    plan: IngestPlan

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        plan, shard = self.plan, row["shard"]
        paths = plan.paths[shard * plan.config.shard_rows : (shard + 1) * plan.config.shard_rows]
        rows: list[tuple[bytes, int, str]] = []
        bad: list[dict[str, str]] = []
        for start in range(0, len(paths), FETCH):
            several = paths[start : start + FETCH]
            # A fetch that fails raises: only what a file holds can make it a bad one.
            for path, data in zip(several, plan.source.get_many(several), strict=True):
                try:
                    rows.append((self._encoded(data), self._label(path), path))
                except BadImageError as error:
                    bad.append({"path": path, "reason": str(error)})
        record = Record(
            shard=_write(plan.out, plan.shard_name(shard), rows, plan.config),
            label_counts=np.bincount([label for _, label, _ in rows], minlength=len(plan.labels)).tolist()
            if plan.labels
            else [],
            bad=bad,
        )
        plan.out.put(f"{RECORDS}/{shard:06d}.json", json.dumps(asdict(record)).encode())
        return {"shard": shard, "images": len(rows), "bad": len(bad)}

    def _encoded(self, data: bytes) -> bytes:
        config = self.plan.config
        return encode(read_picture(data, config.channels, config.side), config.encoding)

    def _label(self, path: str) -> int:
        return self.plan.labels.index(PurePosixPath(path).parent.name) if self.plan.labels else -1


def _write(out: Folder, name: str, rows: list[tuple[bytes, int, str]], config: IngestConfig) -> Shard:
    images, labels, paths = zip(*rows, strict=True) if rows else ((), (), ())
    table = pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "label": pa.array(labels, pa.int32()),
            "path": pa.array(paths, pa.string()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=config.row_group_rows, compression="zstd")
    data = buffer.getvalue()
    out.put(name, data)
    return Shard(name=name, rows=len(rows), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def ingest(plan: IngestPlan) -> Manifest:
    """Make the data set that is planned, or finish it, or find it finished.

    Raises:
        ConfigurationError: if its folder holds an ingest of other files, or of another configuration.
        DataError: if there are too many bad images, or storage refuses.
    """
    out = plan.out
    if not out.create(PLAN, json.dumps({"digest": plan.digest, "source": plan.source.url}).encode()):
        earlier = json.loads(out.get(PLAN))
        if earlier["digest"] != plan.digest:
            raise ConfigurationError(
                f"{out.url} holds an ingest of {earlier['source']} as it was, with the configuration of then; the "
                "files or the ingest.* fields differ now: give another folder, or delete that one"
            )
    if plan.complete:
        log.info("ingest: %s is complete; nothing to do", out.url)
        return Manifest.load(out)

    done = set((out / RECORDS).names())
    missing = [shard for shard in range(plan.shards) if f"{shard:06d}.json" not in done]
    log.info("ingest: %d images into %d shards, %d still to write", len(plan.paths), plan.shards, len(missing))
    if missing:
        items: list[Any] = [{"shard": shard} for shard in missing]
        with cluster():
            for row in ray.data.from_items(items, override_num_blocks=len(items)).map(WriteShard(plan)).iter_rows():
                log.info("ingest: shard %d, %d images, %d quarantined", row["shard"], row["images"], row["bad"])
    return _finish(plan)


def _finish(plan: IngestPlan) -> Manifest:
    read = TypeAdapter(Record).validate_json
    records = [read(plan.out.get(f"{RECORDS}/{shard:06d}.json")) for shard in range(plan.shards)]
    bad = [entry for record in records for entry in record.bad]
    if bad:
        plan.out.put(QUARANTINE, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad).encode())
        log.warning("%d of %d files are unusable; see %s/%s", len(bad), len(plan.paths), plan.out.url, QUARANTINE)
    if len(bad) > plan.config.max_bad_share * len(plan.paths) or len(bad) == len(plan.paths):
        raise DataError(
            f"{len(bad)} of {len(plan.paths)} files are unusable, more than ingest.max_bad_share = "
            f"{plan.config.max_bad_share} allows; the first: {bad[0]['path']}: {bad[0]['reason']}; raise the share, or "
            f"mend the files that {plan.out.url}/{QUARANTINE} lists and ingest into another folder"
        )
    manifest = Manifest(
        side=plan.config.side,
        channels=plan.config.channels,
        encoding=plan.config.encoding,
        row_group_rows=plan.config.row_group_rows,
        labels=plan.labels,
        label_counts=np.sum([record.label_counts for record in records], axis=0).tolist() if plan.labels else [],
        quarantined=len(bad),
        source=plan.source.url,
        shards=[record.shard for record in records if record.shard.rows],
    )
    manifest.save(plan.out)
    return manifest


def ingest_job(job: IngestJob) -> dict[str, Any]:
    """Do what the job says; return where the data set is and what is in it."""
    manifest = ingest(IngestPlan.make(Folder(job.source), Folder(job.out), job.ingest))
    return {
        "data": Folder(job.out).url,
        "images": manifest.rows,
        "quarantined": manifest.quarantined,
        "labels": dict(zip(manifest.labels, manifest.label_counts, strict=True)),
        "shards": len(manifest.shards),
        "bytes": sum(shard.size_bytes for shard in manifest.shards),
        "digest": manifest.digest,
    }


def dry_run(job: IngestJob) -> dict[str, Any]:
    """Return what the job would do, having listed the source and changed nothing."""
    plan = IngestPlan.make(Folder(job.source), Folder(job.out), job.ingest)
    return {
        "dry_run": True,
        "images": len(plan.paths),
        "labels": plan.labels,
        "shards": plan.shards,
        "complete": plan.complete,
        "raw_bytes_when_ingested": len(plan.paths) * job.ingest.side**2 * job.ingest.channels,
        "data": plan.out.url,
    }
