"""What a data set is: its shards, their rows and digests, in ``manifest.json`` beside them, written last.

No manifest, no data set. The digest of the manifest names the data in every checkpoint and every tracked run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipelines.errors import DataError
from pipelines.images import Encoding, Pixels, decode
from pipelines.storage import Folder

NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file, with columns ``image`` (bytes), ``label`` (int32, an index or -1) and ``path``."""

    name: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set of pictures of one shape. Row i of the data set is row i of its shards, laid end to end."""

    side: int
    """Height and width, in pixels."""
    channels: int
    encoding: Encoding
    row_group_rows: int
    labels: list[str]
    """The name of each label; empty for a data set without labels."""
    label_counts: list[int]
    quarantined: int
    """Images that could not be used; ``quarantine.jsonl`` lists them."""
    source: str
    """Where the raw images were, for the record."""
    shards: list[Shard]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.side, self.side, self.channels

    @cached_property
    def digest(self) -> str:
        """The sha256 of all that makes the data what they are; where they came from is no part of it."""
        what = asdict(self)
        del what["source"], what["quarantined"]
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

    def read(self, folder: Folder, rows: NDArray[np.int64]) -> tuple[Pixels, NDArray[np.int64]]:
        """Read rows of the data set, in the order asked for, fetching each row group that holds any of them once.

        Returns:
            uint8 [n, H, W, C] and their labels, int64 [n].

        Raises:
            DataError: if a shard is missing or is not what the manifest says.
        """
        data: list[bytes] = [b""] * len(rows)
        labels = np.empty(len(rows), np.int64)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for s in np.unique(shard_of):
            shard, places = self.shards[s], np.flatnonzero(shard_of == s)
            within = rows[places] - self._starts[s]
            with folder.open(shard.name) as file:
                try:
                    parquet = pq.ParquetFile(file)
                    if parquet.metadata.num_rows != shard.rows:
                        raise DataError(
                            f"{folder.url}/{shard.name} has {parquet.metadata.num_rows} rows, the manifest says "
                            f"{shard.rows}; ingest the data again"
                        )
                    group_of = within // self.row_group_rows
                    for group in np.unique(group_of):
                        table = parquet.read_row_group(int(group), columns=["image", "label"])
                        here = places[group_of == group]
                        chosen = table.take(rows[here] - self._starts[s] - group * self.row_group_rows)
                        labels[here] = chosen["label"].to_numpy()
                        for place, item in zip(here, chosen["image"].to_pylist(), strict=True):
                            data[place] = item
                except (OSError, ValueError, KeyError) as error:
                    raise DataError(f"{folder.url}/{shard.name} cannot be read: {error}") from error
        return decode(data, self.encoding, self.shape), labels
