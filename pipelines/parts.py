"""The tasks of an ingest: parts of the source to their shards and a record each, or to the digests of their images.

A task does a run of parts, in order: one, or several of one Parquet file that it reads in one go. How parts are dealt
to tasks changes nothing in what is written of them.
"""

import hashlib
import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray

from pipelines.cluster import check_node_labels, cluster
from pipelines.images import BadImageError, Encoding, encode, read_picture
from pipelines.progress import IngestProgress
from pipelines.retries import count_elsewhere, retries
from pipelines.shards import IN_PLACE, PICTURES, Shard, ShardWriter
from pipelines.sources import Entry, Source
from pipelines.storage import Folder
from pipelines.stored import Stored

RECORDS, DIGESTS = "records", "digests"
ALL = range(sys.maxsize)
"""The rows of a part that is not cut out of a file."""
GROUP_BYTES, MAX_GROUP_ROWS = 1 << 20, 128
SHARD_BYTES, MAX_SHARD_ROWS = 64 << 20, 8192
"""What a row group and a shard are made to hold, by an estimate, where their rows are not said."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What pictures are made into, down to the last choice."""

    side: int
    channels: Literal[1, 3]
    encoding: Encoding
    jpeg_quality: int
    row_group_rows: int
    shard_rows: int
    compression: Literal["none", "zstd"]


def rows_for(row_bytes: int, group_rows: int, shard_rows: int) -> tuple[int, int]:
    """Return the rows of a row group and of a shard: as said, or where that is 0, as many as fit."""
    group = group_rows or min(max(1, GROUP_BYTES // row_bytes), MAX_GROUP_ROWS)
    return group, shard_rows or max(1, min(SHARD_BYTES // row_bytes, MAX_SHARD_ROWS) // group) * group


def result(folder: str, number: int) -> str:
    """Return the name of what is written of a part, below RECORDS or DIGESTS."""
    return f"{folder}/{number:06d}.json"


@dataclass(frozen=True)
class Part:
    """What has a result of its own: some files of the source, or some rows of one Parquet file."""

    number: int
    files: list[Stored]
    listed: dict[str, str]
    """Labels by path, where these are listed."""
    dropped: frozenset[int] = frozenset()
    """The entries to leave out as duplicates, by their place in the part."""
    rows: range = ALL
    """Of the one Parquet file, those that are meant."""
    share: float = 1.0
    """Of the bytes of its files."""

    @property
    def size_bytes(self) -> int:
        return int(self.share * sum(file.size_bytes for file in self.files))


def as_row(run: list[Part]) -> dict[str, Any]:
    """Return a run of parts as a row of a Ray data set: names may be such as Arrow cannot hold."""
    return {"run": pickle.dumps(run)}


def _entries(source: Source, run: list[Part]) -> Iterator[tuple[Part, Iterator[Entry]]]:
    """Yield each part with its entries; rows that follow each other are read in one go.

    Each row of a Parquet file is one entry, up to the one that says that the rest is lost; of a part behind that
    nothing is left.
    """
    listed = {path: label for part in run for path, label in part.listed.items()}
    at = None
    for part in run:
        if part.rows.start != at:
            stream = source.entries(part.files, listed, part.rows.start)
        yield part, islice(stream, len(part.rows))
        at = part.rows.stop


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a part."""

    shards: list[Shard]
    label_counts: dict[str, int]
    bad: list[dict[str, str]]
    """Path and reason of each image that could not be used, and of each Parquet file or tar that ended too early."""
    broken: int
    """Parquet files and tars that ended too early."""


@dataclass(frozen=True)
class WritePart:
    """The task: parts to their shards and their records in storage."""

    source: Source
    out: Folder
    form: Form

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        run, before = pickle.loads(row["run"]), retries()
        records = [self._write(part, entries) for part, entries in _entries(self.source, run)]
        images = sum(shard.rows for record in records for shard in record.shards)
        bad = sum(len(record.bad) for record in records)
        return {"part": run[0].number, "images": images, "bad": bad, "retries": retries() - before}

    def _write(self, part: Part, entries: Iterator[Entry]) -> Record:
        form, labels, bad, broken = self.form, Counter[str](), list[dict[str, str]](), 0
        in_place = form.encoding == "in-place"
        writer = ShardWriter(
            self.out,
            f"shard-{part.number:06d}",
            IN_PLACE if in_place else PICTURES,
            form.shard_rows,
            form.row_group_rows,
            form.compression,
        )
        found: Iterator[tuple[Stored | None, Entry]]
        found = self.source.listing(part.files, part.listed) if in_place else ((None, entry) for entry in entries)
        for i, (file, entry) in enumerate(found):
            if i in part.dropped:
                continue
            try:
                if entry.reason:
                    raise BadImageError(entry.reason)
                if file:
                    writer.add(entry.path, file.size_bytes, file.version, entry.label)
                else:
                    writer.add(self._encoded(entry.data), entry.label, entry.path)
            except BadImageError as error:
                bad.append({"path": entry.path, "reason": str(error)})
                broken += entry.rest_lost
            else:
                labels.update([entry.label] if entry.label is not None else [])
        record = Record(shards=writer.close(), label_counts=dict(labels), bad=bad, broken=broken)
        self.out.put(result(RECORDS, part.number), json.dumps(asdict(record)).encode())
        return record

    def _encoded(self, data: bytes) -> bytes:
        form = self.form
        pixels = read_picture(data, form.channels, form.side or None)
        if form.encoding == "keep":
            return data  # it could be decoded: that was the question
        assert form.encoding != "in-place"
        try:
            return encode(pixels, form.encoding, form.jpeg_quality)
        except (OSError, ValueError) as error:  # such as a side that JPEG has no room for
            raise BadImageError(f"it cannot be written as {form.encoding}: {error}") from error


@dataclass(frozen=True)
class DigestPart:
    """The task: parts to the digests of their images in storage."""

    source: Source
    out: Folder

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        run, before, images = pickle.loads(row["run"]), retries(), 0
        for part, entries in _entries(self.source, run):
            found, broken = list[tuple[str, str]](), False
            for entry in entries:
                digest = hashlib.blake2b(entry.data, digest_size=16).hexdigest() if entry.data else ""
                found.append((entry.path, digest))
                broken |= entry.rest_lost
            self.out.put(result(DIGESTS, part.number), json.dumps({"found": found, "broken": broken}).encode())
            images += len(found)
        return {"part": run[0].number, "images": images, "bad": 0, "retries": retries() - before}


def do(
    runs: list[list[Part]],
    task: Callable[[dict[str, bytes]], dict[str, int]],
    on_cluster: bool,
    wanted_labels: dict[str, str] | None = None,
) -> None:
    """Do a task for each run of parts, on the cluster or in this process, and say how far it is.

    Args:
        runs: each is named, in what the task returns, by the number of its first part.
        task: from a run as a row to its count of images, bad ones and retries.
        on_cluster: or in this process.
        wanted_labels: labels that a node of the cluster must have for a task to run there.

    Raises:
        ConfigurationError: if no node has the labels, nor ever will.
    """
    progress = IngestProgress({run[0].number: sum(part.size_bytes for part in run) for run in runs})
    rows: list[Any] = [as_row(run) for run in runs]
    if not on_cluster:
        for row in rows:
            told = task(row)
            del told["retries"]  # counted in this process already
            progress.update(**told)
    elif rows:
        remote = {"label_selector": wanted_labels} if wanted_labels else {}
        with cluster():
            check_node_labels(wanted_labels or {})
            for told in ray.data.from_items(rows, override_num_blocks=len(rows)).map(task, **remote).iter_rows():
                count_elsewhere(told.pop("retries"))
                progress.update(**told)


class Duplicate(NamedTuple):
    """An image with the same bytes as one before it."""

    part: int
    place: int
    """Which of the part's entries it is."""
    path: str
    same_as: str


def find_duplicates(found: Sequence[list[tuple[str, str]]], by_path: bool) -> list[Duplicate]:
    """Return every image but the first of those with the same bytes.

    Args:
        found: path and digest of each image, part by part; images without a digest are like no other.
        by_path: whether the order of the source is that of the paths; otherwise it is the one given.
    """
    paths = np.array([path for part in found for path, _ in part], dtype=object)
    digests = np.array([digest for part in found for _, digest in part], dtype="S32")
    order = _ranks(paths) if by_path else np.arange(len(paths))
    starts = np.cumsum([0] + [len(part) for part in found])
    by = np.lexsort((order, digests))
    by = by[digests[by] != b""]
    repeated = np.concatenate([[False], digests[by][1:] == digests[by][:-1]])[: len(by)]
    first = by[np.maximum.accumulate(np.where(repeated, 0, np.arange(len(by))))]
    dropped = sorted(zip(order[by[repeated]], by[repeated], first[repeated], strict=True))
    part_of = np.searchsorted(starts, [place for _, place, _ in dropped], side="right") - 1
    return [
        Duplicate(int(part), int(place - starts[part]), paths[place], paths[same])
        for part, (_, place, same) in zip(part_of, dropped, strict=True)
    ]


def _ranks(paths: NDArray[Any]) -> NDArray[np.int64]:
    ranks = np.empty(len(paths), np.int64)
    ranks[np.argsort(paths)] = np.arange(len(paths))
    return ranks
