"""What an ingest makes of which files: a function of the listing of the source and of the configuration.

The source is listed once and cut into parts, a shard each: image files, in a keyed order (so that neighbours in a shard
are not of one folder); or rows of a Parquet file, in its own order. A part may be one of many of a large file.

A tar is one part of as many shards as it fills, however large it is: it has no index. To find its members by walking
from header to header takes a request for each, one after the other, which on an object store is slower than to read it
all; and whoever makes tars cuts them into many.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Literal, NamedTuple

import numpy as np

from models.philox import stream_key
from pipelines.errors import ConfigurationError
from pipelines.images import Encoding
from pipelines.labels import check_label_column, read_labels, sorted_labels, whose_labels
from pipelines.manifest import NAME, Manifest
from pipelines.parts import ALL, Form, Part, rows_for
from pipelines.permutation import permute
from pipelines.shards import ahead
from pipelines.sources import Source, kind_of, of_kind
from pipelines.storage import Folder
from pipelines.stored import Stored

PLAN = "ingest.json"
"""Beside the manifest: of what it is made, from the first moment on."""
CUT = 2
"""Which way of cutting a source into parts this is: what one way has begun another cannot go on with."""


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is taken for images, and what they are made into."""

    side: int = 32
    """Height and width of the stored images, in pixels: the middle square, resized. 0 leaves each as large as it is,
    for the encodings png, jpeg, keep and in-place."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    encoding: Encoding = "raw"
    """How a shard holds the pixels. raw is the fastest to read, png smaller, neither loses anything; jpeg is the
    smallest; keep takes the files as they are, checked; in-place copies nothing: the shards hold paths, and training
    reads the image files where they lie."""
    jpeg_quality: int = 95
    """Of the encoding jpeg, 1..100; colours are kept for every pixel (4:4:4)."""
    source_kind: Literal["auto", "files", "parquet", "tar"] = "auto"
    """Image files, Parquet files with a column of image bytes, or WebDataset tars; auto looks at the names."""
    labels: str = "folder"
    """folder: the name of the folder that a file is in, if every file is in one; the label column; the sample's .cls,
    .json or .txt. none: no labels. Or the URL of a CSV file with the columns path,label: images without a line in it
    are quarantined."""
    image_column: str = "image"
    """Of Parquet files: bytes, or a struct with bytes in it."""
    label_column: str = "label"
    """Of Parquet files; if the default is not there, there are no labels."""
    drop_duplicates: bool = False
    """Leave out all but the first of images with the same bytes. Reads the source twice."""
    shard_rows: int = 0
    """Images per shard; 0 for about 64 MB."""
    row_group_rows: int = 0
    """Rows that are read at once, and that stay together until the last shuffle; 0 for about 1 MB, 1 to 128 rows."""
    compression: Literal["none", "zstd"] = "none"
    """Of the shards. zstd makes drawings of raw much smaller, photographs hardly."""
    max_bad_share: float = 0.01
    """Share of images, and of Parquet files or tars, that may be unusable before the ingest gives up."""

    def __post_init__(self) -> None:
        if not 0 <= self.side <= 4096:
            raise ConfigurationError(f"ingest.side is {self.side}; it must lie in 1..4096 pixels, or be 0")
        if self.side == 0 and self.encoding == "raw":
            raise ConfigurationError(
                "ingest.side is 0 and ingest.encoding raw, whose images are of one size: set a side, or take png"
            )
        if self.side and self.encoding in ("keep", "in-place"):
            raise ConfigurationError(
                f"ingest.side is {self.side} and ingest.encoding {self.encoding}, which leaves images as large as they "
                "are: set ingest.side to 0, or take another encoding"
            )
        if self.labels not in ("folder", "none") and "/" not in self.labels and not self.labels.endswith(".csv"):
            raise ConfigurationError(
                f"ingest.labels is {self.labels!r}; it must be folder, none, or the URL of a CSV file with the columns "
                "path,label"
            )
        for name in ("shard_rows", "row_group_rows"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"ingest.{name} is {getattr(self, name)}; it must be at least 1, or 0")
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigurationError(f"ingest.jpeg_quality is {self.jpeg_quality}; it must lie in 1..100")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigurationError(f"ingest.max_bad_share is {self.max_bad_share}; it must lie in 0..1")

    def form(self, mean_bytes: int) -> Form:
        """Return what images are made into, with rows chosen by their size; ``mean_bytes`` is that of a file."""
        pixels = self.side**2 * self.channels
        row_bytes = {"raw": pixels, "png": pixels // 2, "jpeg": pixels // 4, "in-place": 1}.get(
            self.encoding
        ) or mean_bytes
        group, shard = rows_for(row_bytes, self.row_group_rows, self.shard_rows)
        return Form(
            side=self.side,
            channels=self.channels,
            encoding=self.encoding,
            jpeg_quality=self.jpeg_quality,
            row_group_rows=group,
            shard_rows=shard,
            compression=self.compression,
        )


class Cut(NamedTuple):
    """What a part is cut out of the source."""

    files: slice
    rows: range = ALL
    share: float = 1.0
    group: int = 0
    """The row group of the file that it begins in."""


@dataclass(frozen=True)
class IngestPlan:
    """Which file goes into which part: a function of the listing and the configuration."""

    source: Source
    out: Folder
    config: IngestConfig
    files: list[Stored]
    """In the order of the parts."""
    listed: dict[str, str]
    """Labels by path, where these are listed."""
    digest: str

    @staticmethod
    def make(source: Folder, out: Folder, config: IngestConfig) -> "IngestPlan":
        """List the source.

        Raises:
            DataError: if it holds no images, or cannot be listed.
            ConfigurationError: if it holds files of several kinds, or of one that the encoding cannot be for, or
                lacks the label column that was asked for, or if it and the folder of the data set lie in each other.
        """
        _check_apart(source, out)
        found = source.find()
        kind = kind_of(found, config.source_kind, source.url)
        if kind != "files" and config.encoding == "in-place":
            raise ConfigurationError(
                f"ingest.encoding is in-place and {source.url} holds files of kind {kind}; only image files can be "
                "read in place: take keep, or raw"
            )
        files = of_kind(found, kind)
        listed = read_labels(config.labels) if config.labels not in ("folder", "none") else {}
        form = asdict(config)
        del form["max_bad_share"]  # decides whether to go on, not what is made
        where = [source.url] if config.encoding == "in-place" else []  # a copy can do without the place it is from
        what = json.dumps([form, files, listed, *where], sort_keys=True)
        labels = whose_labels(config.labels, kind, files)
        if kind == "files":
            order = permute(np.arange(len(files)), len(files), stream_key(0, "ingest"))
            files = [files[i] for i in order]
        reader = Source(
            folder=source,
            kind=kind,
            labels=labels,
            image_column=config.image_column,
            label_column=config.label_column,
        )
        if kind == "parquet" and labels == "own" and config.label_column != IngestConfig.label_column:
            check_label_column(reader, files)
        return IngestPlan(reader, out, config, files, listed, hashlib.sha256(what.encode()).hexdigest())

    @cached_property
    def form(self) -> Form:
        """What images are made into. How many there are in a Parquet file or a tar is not known: 64 kB are supposed."""
        known = sum(file.size_bytes for file in self.files) // len(self.files)
        return self.config.form(max(1, known) if self.source.kind == "files" else 64 << 10)

    @property
    def images(self) -> int | None:
        """The number of images, usable or not; None if only reading the source would tell."""
        return len(self.files) if self.source.kind == "files" else None

    @cached_property
    def labels(self) -> list[str] | None:
        """The names of the labels; None if only reading the source would tell."""
        if self.source.labels == "own" and self.source.kind != "files":
            return None
        if self.source.labels == "own":
            return sorted_labels({file.name.split("/")[-2] for file in self.files})
        return sorted_labels(set(self.listed.values()))

    @property
    def parts(self) -> int:
        return len(self._cuts)

    @cached_property
    def _cuts(self) -> list[Cut]:
        """The parts. That takes the footer of each Parquet file."""
        if self.source.kind == "parquet":
            footers = enumerate(ahead(self.source.folder, self.source.group_rows, self.files))
            return [cut for i, group_rows in footers for cut in _of_parquet(i, group_rows, self.form.shard_rows)]
        together = self.form.shard_rows if self.source.kind == "files" else 1
        return [Cut(slice(i, i + together)) for i in range(0, len(self.files), together)]

    def part(self, number: int, dropped: frozenset[int] = frozenset()) -> Part:
        """Return what a part is."""
        cut = self._cuts[number]
        files = self.files[cut.files]
        if self.source.kind == "files":
            paths = [file.name for file in files]
        elif cut.rows == ALL:
            paths = list(self._listed_in[files[0].name])
        else:
            paths = [f"{files[0].name}/{row}" for row in cut.rows]
        listed = {path: self.listed[path] for path in paths if path in self.listed}
        return Part(number, files, listed, dropped, cut.rows, cut.share)

    def runs(self, numbers: list[int]) -> list[list[int]]:
        """Return the parts with these numbers, rising, in runs that one task each does.

        Those that begin in one row group are a run: it cannot be entered but at its beginning, and so it is read twice
        at most, by the run that ends in it and the run that begins in it.
        """

        def begins(number: int) -> tuple[int, int]:
            return self._cuts[number].files.start, self._cuts[number].group

        return [list(run) for _, run in groupby(numbers, begins)]

    def behind(self, broken: set[int]) -> set[int]:
        """Return the parts that come after a broken one in the same file: whatever was made of them, they are lost.

        One task for the whole file would have met the break before them, and the data set is to be the same.
        """
        first = {self._cuts[number].files.start: number for number in sorted(broken, reverse=True)}
        return {number for number, cut in enumerate(self._cuts) if number > first.get(cut.files.start, number)}

    @cached_property
    def _listed_in(self) -> dict[str, dict[str, str]]:
        """Labels by Parquet file or tar, then by path: that of an image begins with that of its file."""
        listed: dict[str, dict[str, str]] = {file.name: {} for file in self.files}
        for path, label in self.listed.items():
            end = path.find("/")
            while end >= 0:
                if path[:end] in listed:
                    listed[path[:end]][path] = label
                end = path.find("/", end + 1)
        return listed

    def begin(self) -> None:
        """Write down in the folder what is to be made there, or see that it is so written already.

        Raises:
            ConfigurationError: if its folder holds an ingest of other files, or of another configuration.
        """
        what = {"digest": self.digest, "source": self.source.folder.url, "cut": CUT}
        if not self.out.create(PLAN, json.dumps(what).encode()):
            self._check_begun()

    @property
    def complete(self) -> bool:
        """Whether the data set is there already; raises as :meth:`begin` does."""
        self._check_begun()
        return self.out.exists(NAME)

    def finished(self) -> Manifest | None:
        """Return the manifest of the data set if it is there already; raises as :meth:`begin` does."""
        return Manifest.load(self.out) if self.complete else None

    def _check_begun(self) -> None:
        if self.out.exists(PLAN):
            earlier = json.loads(self.out.get(PLAN))
        elif self.out.exists(NAME):  # nobody can know what it was made of
            earlier = {"digest": None, "source": Manifest.load(self.out).source}
        else:
            return
        if earlier["digest"] != self.digest:
            raise ConfigurationError(
                f"{self.out.url} holds an ingest of {earlier['source']} as it was, with the configuration of then; the "
                "files or the ingest.* fields differ now: give another folder, or delete that one"
            )
        if earlier.get("cut") != CUT and not self.out.exists(NAME):
            raise ConfigurationError(
                f"{self.out.url} holds an ingest that another version of this program has begun and not finished: give "
                "another folder, or delete that one"
            )


def _of_parquet(file: int, group_rows: list[int], shard_rows: int) -> Iterator[Cut]:
    """Yield the parts of a Parquet file with these row groups; a broken one is a part that will say so."""
    ends = list(accumulate(group_rows))
    rows = ends[-1] if ends else 0
    if rows <= shard_rows:
        yield Cut(slice(file, file + 1))
        return
    for first in range(0, rows, shard_rows):
        some = range(first, min(first + shard_rows, rows))
        yield Cut(slice(file, file + 1), some, len(some) / rows, bisect_right(ends, first))


def _check_apart(source: Folder, out: Folder) -> None:
    """Raise ConfigurationError if a source holds its data set, or lies in it: the next listing would find that too."""
    paths = [os.path.realpath(folder.path()) if folder.is_local else folder.path() for folder in (source, out)]
    one, other = (path.rstrip("/") + "/" for path in paths)
    if source.filesystem == out.filesystem and (one.startswith(other) or other.startswith(one)):
        raise ConfigurationError(
            f"the data set is to be {out.url}, and its source is {source.url}: one lies in the other, so the next "
            "listing of the source would find the data set; give a folder beside the source"
        )
