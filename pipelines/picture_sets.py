"""Sets of pictures that can be held against each other: data sets, and finished sets of samples."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ConfigurationError, DataError
from pipelines.images import Pixels, View
from pipelines.manifest import Manifest, RowGroups
from pipelines.sample_set import MANIFEST, SampleSet
from pipelines.storage import Folder


class Found(NamedTuple):
    """Pictures that were read, at most as many as were asked for."""

    image: Pixels
    """uint8 [n, H, W, C]."""
    label: NDArray[np.int64]
    """[n], an index into the names of the labels, or -1."""
    row: NDArray[np.int64]
    """[n], the place of each in its set."""


@dataclass(frozen=True)
class DataPictures:
    """The pictures of a data set, as the network saw them or would see them."""

    folder: Folder
    manifest: Manifest
    view: View

    @property
    def n(self) -> int:
        return self.manifest.rows

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.view.shape

    @property
    def labels(self) -> list[str]:
        return self.manifest.labels

    @property
    def lineage(self) -> dict[str, Any]:
        return {}

    @property
    def drawn_by(self) -> list[str]:
        return ["none", ""]

    @property
    def seeds(self) -> list[int]:
        return []

    def read(self, start: int, stop: int) -> Found:
        """Read rows [start, stop). What is unusable is left out: another picture in its place would count twice.

        Raises:
            DataError: if the data are not what the manifest says, or none of these pictures can be used.
        """
        rows = np.arange(start, stop)
        found = self.manifest.read(self.folder, rows, self.view)
        usable = found.row == rows
        if not usable.any():
            raise DataError(f"none of the pictures {start} to {stop - 1} of {self.folder.url} can be used")
        return Found(found.image[usable], found.label[usable], rows[usable])

    def pieces(self, rows: NDArray[np.int64], at_once: int) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
        """Yield any rows, so many at once, and their pictures, less what is unusable: none may be left of a piece."""
        kept: RowGroups = {}
        for start in range(0, len(rows), at_once):
            asked = rows[start : start + at_once]
            found = self.manifest.read(self.folder, asked, self.view, kept=kept)
            usable = found.row == asked  # what would stand in for it stands for itself
            yield asked[usable], found.image[usable]
            for key in list(kept)[:-1]:  # the next piece may go on in the last row group
                del kept[key]


@dataclass(frozen=True)
class SamplePictures:
    """The pictures of a finished set of samples."""

    samples: SampleSet

    @property
    def folder(self) -> Folder:
        return self.samples.folder

    @property
    def about(self) -> dict[str, Any]:
        return self.samples.about

    @property
    def n(self) -> int:
        return self.samples.count

    @property
    def digest(self) -> str:
        """Of the shards, in order."""
        what = [self.about["shape"], [file["sha256"] for file in self.about["files"]]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.samples.shape

    @property
    def labels(self) -> list[str]:
        """The names, if they are on record: of older sets they are not."""
        return list(self.about.get("labels", []))

    @property
    def labels_unsaid(self) -> bool:
        """Whether it is an older set, of which the names are not on record."""
        return "labels" not in self.about

    @property
    def lineage(self) -> dict[str, Any]:
        return dict(self.about["lineage"])

    @property
    def drawn_by(self) -> list[str]:
        """The tracker of the run that drew them, and our own id of it; empty if none was recorded."""
        recorded = self.about.get("recorded", {})
        return [str(recorded.get("uri", "none")), str(recorded.get("run", ""))]

    @property
    def seeds(self) -> list[int]:
        return list(self.about["seeds"])

    def read(self, start: int, stop: int) -> Found:
        """Read the samples [start, stop), counted from the first.

        Raises:
            DamagedError: if a shard is missing, or is not what was written.
        """
        several = [self._shard(*which) for which in self._parts(start, stop)]
        image, label = (np.concatenate(column) for column in zip(*several, strict=True))
        return Found(image, label, np.arange(start, stop))

    def _shard(self, part: int, rows: slice) -> tuple[Pixels, NDArray[np.int64]]:
        found = self.samples.read(part)
        return self.samples.decoded(found.image[rows], self.samples.names[part]), found.label[rows]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield the shards that hold samples, and which of each are meant."""
        for part, end in enumerate(accumulate(file["images"] for file in self.about["files"])):
            first = end - self.about["files"][part]["images"]
            if first < stop and start < end:
                yield part, slice(max(start - first, 0), stop - first)


Pictures: TypeAlias = DataPictures | SamplePictures


@dataclass(frozen=True)
class Pair:
    """Two sets of pictures that can be compared."""

    samples: Pictures
    reference: Pictures

    @staticmethod
    def find(samples: Folder, reference: Folder | None, side: int = 0) -> "Pair":
        """Find two sets; None is the data that the network of the samples was trained on.

        Args:
            samples: a finished set of samples, or a data set.
            reference: either too.
            side: height and width that data sets are seen at; 0: as samples are, or as both are stored.

        Raises:
            DataError: if either is not there or not finished, or if the two cannot be compared.
            ConfigurationError: if it is not said what with, or at what side.
        """
        first = _open(samples)
        trained_on = "" if isinstance(first, Manifest) else first.lineage["data_url"]
        if not reference and not trained_on:
            raise ConfigurationError(
                f"reference is empty, and it is not on record what the network was trained on that made {samples.url}: "
                "give --reference FOLDER"
            )
        reference = reference or Folder(trained_on)
        second = _open(reference)
        drawn = [one for one in (first, second) if isinstance(one, SamplePictures)]
        zoom = drawn[0].lineage.get("zoom", 1.0) if drawn else 1.0
        seen = _common_side(samples, first, reference, second, side)
        pair = Pair(_seen(samples, first, seen, zoom), _seen(reference, second, seen, zoom))
        if pair.samples.shape != pair.reference.shape:
            raise _cannot(samples, pair.samples.shape, reference, pair.reference.shape)
        return pair

    @property
    def labels(self) -> list[str]:
        """The labels that both know, by the numbers that both have for them.

        Raises:
            DataError: if either has none, or they are not the same.
        """
        both = [self.samples, self.reference]
        for i, one in enumerate(both):
            other = both[1 - i]
            if isinstance(one, SamplePictures) and one.labels_unsaid and one.lineage["data_digest"] == other.digest:
                return other.labels  # those that its network learned
        if not all(one.labels for one in both) or self.samples.labels != self.reference.labels:
            said = "; ".join(f"{one.folder.url} has {', '.join(one.labels) or 'none'}" for one in both)
            raise DataError(f"per_class needs two sets with the same labels: {said}")
        return self.samples.labels


def _open(folder: Folder) -> Manifest | SamplePictures:
    """Return what a folder holds, of which one kind has a view yet to get."""
    if not folder.exists(MANIFEST):
        raise DataError(
            f"{folder.url} is no finished set of samples, nor a data set: it has no {MANIFEST}; run jobs/sample.py or "
            "jobs/ingest.py first"
        )
    try:
        about = json.loads(folder.get(MANIFEST))
        is_of_samples = "files" in about
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder.url}/{MANIFEST} cannot be read: {error}") from error
    if not is_of_samples:
        return Manifest.load(folder)
    return SamplePictures(SampleSet.find(folder))


def _common_side(
    a: Folder, first: Manifest | SamplePictures, b: Folder, second: Manifest | SamplePictures, asked: int
) -> int:
    """Return the height and width that both are seen at."""
    given = [first.shape[0], second.shape[0]]
    drawn = [one.shape[0] for one in (first, second) if isinstance(one, SamplePictures)]
    if asked and any(side != asked for side in drawn):
        raise ConfigurationError(f"side is {asked}; samples have the side that they were drawn at, {drawn[0]}: drop it")
    seen = asked or (drawn[0] if drawn else max(given))
    if not seen:
        raise ConfigurationError(f"side is 0, and the pictures of {a.url} and {b.url} have sizes of their own: give it")
    if not asked and not drawn and 0 not in given and given[0] != given[1]:
        raise ConfigurationError(
            f"side is 0; {a.url} has pictures of {given[0]} pixels and {b.url} of {given[1]}: say which, such as "
            f"--side {min(given)}"
        )
    if any(0 < side < seen for side in given):  # enlarged, they would be told apart by that
        raise _cannot(a, first.shape, b, second.shape)
    return seen


def _seen(folder: Folder, found: Manifest | SamplePictures, side: int, zoom: float) -> Pictures:
    return found if isinstance(found, SamplePictures) else as_seen(folder, found, side, zoom)


def as_seen(folder: Folder, manifest: Manifest, side: int, zoom: float) -> DataPictures:
    """Return the pictures of a data set as a network sees them that was shown its own with this side and zoom."""
    if manifest.side and side * zoom > manifest.side:
        zoom = 1.0  # other data than the network learned from: there is nothing to cut off
    return DataPictures(folder, manifest, View(side=side, channels=manifest.channels, zoom=zoom))


def _cannot(a: Folder, first: tuple[int, int, int], b: Folder, second: tuple[int, int, int]) -> DataError:
    one, other = (" x ".join(map(str, shape)) for shape in (first, second))
    return DataError(f"the pictures of {a.url} are {one}, those of {b.url} {other}; they cannot be compared")
