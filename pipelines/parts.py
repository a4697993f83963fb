"""The tasks of an ingest: a part of the source to its shards and a record, or to the digests of its images."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import ray.data
from numpy.typing import NDArray

from pipelines.cluster import cluster
from pipelines.images import BadImageError, Encoding, encode, read_picture
from pipelines.progress import IngestProgress
from pipelines.retries import count_elsewhere, retries
from pipelines.shards import IN_PLACE, PICTURES, Shard, ShardWriter
from pipelines.sources import Entry, Source
from pipelines.storage import Folder, Stored

RECORDS, DIGESTS = "records", "digests"
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
    """What one task does: some files of the source."""

    number: int
    files: list[Stored]
    listed: dict[str, str]
    """Labels by path, where these are listed."""
    dropped: frozenset[int] = frozenset()
    """The entries to leave out as duplicates, by their place in the part."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def row(self) -> dict[str, Any]:
        """Return the part as a row of a Ray data set: names may be such as Arrow cannot hold."""
        return {"part": pickle.dumps(self)}


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
    """The task: a part to its shards and its record in storage."""

    source: Source
    out: Folder
    form: Form

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        part, before = pickle.loads(row["part"]), retries()
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
        if in_place:
            found = self.source.listing(part.files, part.listed)
        else:
            found = ((None, entry) for entry in self.source.entries(part.files, part.listed))
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
        images = sum(shard.rows for shard in record.shards)
        return {"part": part.number, "images": images, "bad": len(bad), "retries": retries() - before}

    def _encoded(self, data: bytes) -> bytes:
        form = self.form
        pixels = read_picture(data, form.channels, form.side or None)
        if form.encoding == "keep":
            return data  # it could be decoded: that was the question
        assert form.encoding != "in-place"
        return encode(pixels, form.encoding, form.jpeg_quality)


@dataclass(frozen=True)
class DigestPart:
    """The task: a part to the digests of its images in storage."""

    source: Source
    out: Folder

    def __call__(self, row: dict[str, bytes]) -> dict[str, int]:
        part, before = pickle.loads(row["part"]), retries()
        found = [
            (entry.path, hashlib.blake2b(entry.data, digest_size=16).hexdigest() if entry.data else "")
            for entry in self.source.entries(part.files, part.listed)
        ]
        self.out.put(result(DIGESTS, part.number), json.dumps(found).encode())
        return {"part": part.number, "images": len(found), "bad": 0, "retries": retries() - before}


def do(parts: list[Part], task: Callable[[dict[str, bytes]], dict[str, int]], on_cluster: bool) -> None:
    """Do a task for each part, on the cluster or in this process, and say how far it is."""
    progress = IngestProgress({part.number: part.size_bytes for part in parts})
    rows: list[Any] = [part.row() for part in parts]
    if not on_cluster:
        for row in rows:
            told = task(row)
            del told["retries"]  # counted in this process already
            progress.update(**told)
    elif rows:
        with cluster():
            for told in ray.data.from_items(rows, override_num_blocks=len(rows)).map(task).iter_rows():
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
