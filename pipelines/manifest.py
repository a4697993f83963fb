"""What a data set is: its shards, their rows and digests, in ``manifest.json`` beside them, written last.

No manifest, no data set. The digest of the manifest names the data in every checkpoint and every tracked run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipelines.errors import ConfigurationError, DamagedError, DataError
from pipelines.images import MIDDLE, BadImageError, Encoding, Pixels, View, as_stored
from pipelines.shards import READ_IN_PLACE, READ_OF_PICTURES, Shard, ahead, read_group
from pipelines.sources import portions
from pipelines.storage import Folder

NAME = "manifest.json"
MAX_SKIPS = 1000
"""Unusable pictures in a row that are passed over before a data set is refused."""


RowGroups: TypeAlias = dict[tuple[str, int], Any]
"""Tables, by the name of the shard and the number in it."""


class BadRow(NamedTuple):
    """A picture that could not be used."""

    row: int
    path: str
    reason: str


class Rows(NamedTuple):
    """What was read: n pictures of one shape, in the order that was asked for."""

    image: Pixels
    """uint8 [n, H, W, C]."""
    label: NDArray[np.int64]
    """[n], an index into the manifest's labels, or -1."""
    row: NDArray[np.int64]
    """[n], the row that is really there: an unusable picture is replaced by the next usable row."""
    bad: list[BadRow]
    """Each row that was replaced, once."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set of pictures. Row i of the data set is row i of its shards, laid end to end."""

    side: int
    """Height and width, in pixels; 0 where every picture has a shape of its own."""
    channels: Literal[1, 3]
    encoding: Encoding
    row_group_rows: int
    labels: list[str]
    """The name of each label; empty for a data set without labels."""
    label_counts: list[int]
    """Pictures of each label."""
    quarantined: int
    """Images that could not be used; ``quarantine.jsonl`` lists them."""
    duplicates: int = 0
    """Images that were left out because another has the same bytes; ``duplicates.jsonl`` lists them."""
    source: str
    """Where the raw images were, for the record; of pictures in place, where they are."""
    shards: list[Shard]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """What an image takes as it is stored, on average, in bytes."""
        return max(1, sum(shard.image_bytes for shard in self.shards) // max(self.rows, 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.side, self.side, self.channels

    @cached_property
    def digest(self) -> str:
        """The sha256 of all that makes the data what they are; where they came from is no part of it."""
        what = asdict(self)
        del what["source"], what["quarantined"], what["duplicates"]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0] + [shard.rows for shard in self.shards])

    def save(self, folder: Folder) -> None:
        folder.put(NAME, json.dumps(asdict(self) | {"digest": self.digest}, indent=1).encode())

    @staticmethod
    def load(folder: Folder) -> "Manifest":
        """Read the manifest of a data set.

        Raises:
            DataError: if there is none, if it is not one, or if it was changed by hand.
        """
        text = folder.get(NAME)
        try:
            content = json.loads(text)
            digest = content.pop("digest")
            manifest = TypeAdapter(Manifest).validate_python(content)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise DataError(f"{folder.url}/{NAME} is not the manifest of a data set: {error}") from error
        if manifest.digest != digest:
            raise DataError(f"{folder.url}/{NAME} does not agree with its own digest; ingest the data again")
        return manifest

    def read(
        self,
        folder: Folder,
        rows: NDArray[np.int64],
        view: View | None = None,
        at: NDArray[np.float64] | None = None,
        kept: RowGroups | None = None,
        barred: NDArray[np.int64] | None = None,
    ) -> Rows:
        """Read rows of the data set, in the order asked for, fetching each row group that holds any of them once.

        Args:
            folder: where the data set is.
            rows: int64 [n].
            view: how to look at the pictures; None for as they are stored, in a data set of one shape.
            at: where each cut is made, [n, 2] as in :data:`pipelines.images.Place`; None for the middle.
            kept: row groups of earlier calls, which are not fetched again; those of this one are added.
            barred: rows that must not take the place of an unusable one.

        Raises:
            DataError: if a shard is missing or is not what the manifest says, or a file in place has changed.
            ConfigurationError: if a view is needed and none is given.
        """
        if view is None and (not self.side or self.encoding in ("keep", "in-place")):
            raise ConfigurationError(
                f"the pictures of {folder.url} have sizes of their own; say the side to see them at"
            )
        window = _Window(self, folder, view, rows.astype(np.int64), at, {} if kept is None else kept)
        bad: dict[int, BadRow] = {}
        places = np.arange(len(rows))
        for _ in range(MAX_SKIPS):
            places = window.fill(places, bad)
            if not len(places):
                return Rows(window.image, window.label, window.row, list(bad.values()))
            window.row[places] = self._after(window.row[places], barred)
        raise DataError(
            f"{MAX_SKIPS} pictures in a row are unusable in {folder.url}; the last: {list(bad.values())[-1].path}: "
            f"{list(bad.values())[-1].reason}"
        )

    def _after(self, row: NDArray[np.int64], barred: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Return the next row after each, none of those that are barred."""
        row = (row + 1) % self.rows
        while barred is not None and (hit := np.isin(row, barred)).any():
            row[hit] = (row[hit] + 1) % self.rows
        return row


class _Window:
    """The rows of one call, filled in row group by row group."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Folder,
        view: View | None,
        row: NDArray[np.int64],
        at: NDArray[np.float64] | None,
        kept: RowGroups,
    ) -> None:
        self.manifest, self.folder, self.view, self.row, self.at, self.kept = manifest, folder, view, row, at, kept
        self.image = np.empty((len(row), *(view or manifest).shape), np.uint8)
        self.label = np.full(len(row), -1, np.int64)
        self.in_place = manifest.encoding == "in-place"
        self.columns = READ_IN_PLACE if self.in_place else READ_OF_PICTURES
        self.index_of = {name: i for i, name in enumerate(manifest.labels)}

    def fill(self, places: NDArray[np.int64], bad: dict[int, BadRow]) -> NDArray[np.int64]:
        """Fill in some places of the window; return those whose row is unusable, and add these to ``bad``."""
        jobs = list(self._groups(places))
        tables = ahead(self.folder, lambda job: self._table(job[0], job[1]), jobs)
        files: list[tuple[int, str, int, str]] = []  # place, path, size and version of each
        failed: list[tuple[int, str, str]] = []  # place, path and reason of each
        for (shard, group, here, within), table in zip(jobs, tables, strict=True):
            try:
                self._take_labels(table["label"], here, within)
                if self.in_place:
                    names = table.take(within)
                    said = (names[column].to_pylist() for column in ("path", "size_bytes", "version"))
                    files += zip(here, *said, strict=True)
                else:
                    for place, reason in self._take_images(table["image"], here, within):
                        failed.append((place, self._path(shard, group, int(self.row[place])), reason))
            except (ValueError, KeyError, IndexError) as error:
                raise DamagedError(
                    f"{self.folder.url}/{shard.name} does not hold what the manifest says: {error!r}; ingest again"
                ) from error
        if files:
            failed += self._take_files(files)
        for place, path, reason in failed:
            bad[int(self.row[place])] = BadRow(int(self.row[place]), path, reason)
        return np.array([place for place, _, _ in failed], np.int64)

    def _table(self, shard: Shard, group: int) -> Any:
        if (shard.name, group) not in self.kept:
            self.kept[shard.name, group] = read_group(self.folder, shard, group, self.columns)
        return self.kept[shard.name, group]

    def _groups(self, places: NDArray[np.int64]) -> Iterator[tuple[Shard, int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each row group with the places that it fills and, for each, the row within the group."""
        starts, group_rows = self.manifest._starts, self.manifest.row_group_rows
        rows = self.row[places]
        shard_of = np.searchsorted(starts, rows, side="right") - 1
        group_of, within = np.divmod(rows - starts[shard_of], group_rows)
        order = np.lexsort((group_of, shard_of))
        changes = np.flatnonzero(np.diff(shard_of[order]) | np.diff(group_of[order])) + 1
        for chosen in np.split(order, changes):
            if len(chosen):
                shard = self.manifest.shards[shard_of[chosen[0]]]
                yield shard, int(group_of[chosen[0]]), places[chosen], within[chosen]

    def _take_labels(self, column: Any, here: NDArray[np.int64], within: NDArray[np.int64]) -> None:
        labels = column.combine_chunks()
        # A row group has a dictionary of its own: from its indices to ours; the last entry is for rows without label.
        index_of = np.array([self.index_of[name] for name in labels.dictionary.to_pylist()] + [-1])
        indices = labels.indices.fill_null(-1) if labels.null_count else labels.indices
        self.label[here] = index_of[indices.to_numpy()[within]]

    def _take_images(
        self, images: Any, here: NDArray[np.int64], within: NDArray[np.int64]
    ) -> Iterator[tuple[int, str]]:
        """Take pictures of a row group; yield place and reason of each that is unusable."""
        column = images.combine_chunks()
        if self.manifest.encoding != "raw":
            for place, w in zip(here.tolist(), within.tolist(), strict=True):
                if reason := self._decode(place, column[w].as_py()):
                    yield place, reason
            return
        pixels = _raw(column, self.manifest.shape)
        if self.view is None:
            self.image[here] = pixels[within]
            return
        for place, w in zip(here.tolist(), within.tolist(), strict=True):
            self.image[place] = self.view.of_pixels(pixels[w], self._at(place))

    def _take_files(self, files: list[tuple[int, str, int, str]]) -> Iterator[tuple[int, str, str]]:
        """Fetch and take pictures that are in place; yield place, path and reason of each that is unusable."""
        source = Folder(self.manifest.source)
        parts = [files[part] for part in portions([size for _, _, size, _ in files])]
        fetched = ahead(source, lambda part: source.get_unchanged([f[1] for f in part], [f[3] for f in part]), parts)
        for part, contents in zip(parts, fetched, strict=True):
            for (place, path, _, _), data in zip(part, contents, strict=True):
                if reason := self._decode(int(place), data):
                    yield int(place), path, reason

    def _decode(self, place: int, data: bytes) -> str:
        """Decode a picture into its place; return what is wrong with it, or nothing."""
        try:
            view = self.view
            self.image[place] = view.of_file(data, self._at(place)) if view else as_stored(data, self.manifest.shape)
        except BadImageError as error:
            return str(error)
        return ""

    def _at(self, place: int) -> tuple[float, float]:
        return MIDDLE if self.at is None else (self.at[place, 0], self.at[place, 1])

    def _path(self, shard: Shard, group: int, row: int) -> str:
        within = row - int(self.manifest._starts[self.manifest.shards.index(shard)])
        paths = read_group(self.folder, shard, group, ("path",))["path"]
        return str(paths[within - group * self.manifest.row_group_rows].as_py())


def _raw(column: Any, shape: tuple[int, int, int]) -> Pixels:
    """Look at a column of pixels without copying them: uint8 [n, H, W, C]."""
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    if (np.diff(starts) != np.prod(shape)).any():
        raise ValueError(f"a picture is not of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(data, np.uint8)[starts[0] : starts[-1]].reshape(-1, *shape)
