"""A finished set of samples, read: its manifest, and its shards, each proved to be what was written."""

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipelines.errors import DamagedError, DataError
from pipelines.images import BadImageError, Pixels, decode
from pipelines.storage import Folder

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
"""Of a finished set; the one without content comes last."""
KEYS = {"seeds", "shape", "lineage", "files"}


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    images: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _About:
    """What a manifest must say, whatever more it does."""

    seeds: tuple[int, int]
    shape: tuple[Literal[1, 3], int, int]
    lineage: dict[str, Any]
    files: list[_File]
    labels: list[str] = field(default_factory=list)


class Samples(NamedTuple):
    """The samples of a shard."""

    seed: NDArray[np.int64]
    """[n]."""
    label: NDArray[np.int64]
    """[n], an index into the labels that the network knows; -1 for none."""
    image: list[bytes]
    """The PNG of each."""
    lineage: dict[str, Any]
    """What they have in common. Shards of a set may be drawn by several revisions; that of the set is the last one."""


@dataclass(frozen=True)
class SampleSet:
    """A finished set of samples."""

    folder: Folder
    content: bytes
    """Its manifest, as it is stored."""

    @staticmethod
    def find(folder: Folder) -> "SampleSet":
        """Read the manifest of a finished set of samples.

        Raises:
            DataError: if the folder is none.
        """
        if not folder.exists(SUCCESS):
            raise DataError(
                f"{folder.url} is no finished set of samples: it has no {SUCCESS}; run jobs/sample.py first"
            )
        content, where = folder.get(MANIFEST), f"{folder.url}/{MANIFEST}"
        try:
            about = TypeAdapter(_About).validate_json(content, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"]) or "it"
            raise DataError(
                f"{where} is not the manifest of samples: it must have {sorted(KEYS)}; {place}: {problem['msg']}"
            ) from error
        if not about.files:
            raise DataError(f"{where} is not the manifest of samples: it must have files, and names none")
        return SampleSet(folder, content)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the manifest says."""
        return dict(json.loads(self.content))

    @property
    def lineage(self) -> dict[str, Any]:
        """What all samples of the set have in common."""
        return dict(self.about["lineage"])

    @property
    def names(self) -> list[str]:
        """The names of the shards."""
        return [str(file["name"]) for file in self.about["files"]]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(int(file["images"]) for file in self.about["files"])

    @property
    def shape(self) -> tuple[int, int, Literal[1, 3]]:
        """Height, width and channels of each."""
        channels, height, width = self.about["shape"]
        return height, width, channels

    def read(self, part: int) -> Samples:
        """Read a shard.

        Raises:
            DamagedError: if it is not what was written.
        """
        return self.proved(part, self.folder.get(self.names[part]))

    def proved(self, part: int, data: bytes) -> Samples:
        """Read the bytes of a shard.

        Raises:
            DamagedError: if they are not what was written.
        """
        file = self.about["files"][part]
        where = f"{self.folder.url}/{file['name']}"
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise DamagedError(f"{where} is not what was written: its sha256 differs from the manifest's")
        return read_shard(data, where)

    def pixels(self, part: int) -> Pixels:
        """Return the pictures of a shard, uint8 [n, H, W, C]."""
        return self.decoded(self.read(part).image, self.names[part])

    def decoded(self, images: list[bytes], name: str) -> Pixels:
        """Decode pictures of the shard of a name."""
        try:
            return decode(images, "png", self.shape)
        except BadImageError as error:
            raise DamagedError(f"{self.folder.url}/{name} holds a picture that is none: {error}") from error


def read_shard(data: bytes, where: str) -> Samples:
    """Read the bytes of a shard of samples.

    Raises:
        DamagedError: if they are none; it names ``where`` they are.
    """
    try:
        table = pq.read_table(io.BytesIO(data), columns=["seed", "label", "image"])
        columns = [table[name] for name in ("seed", "label", "image")]
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DamagedError(f"{where} is no shard of samples: {error}") from error
    seed, label, image = columns
    if not all(pa.types.is_integer(column.type) for column in (seed, label)) or not pa.types.is_binary(image.type):
        raise DamagedError(f"{where} is no shard of samples: seeds and labels must be integers, images bytes")
    if not len(seed) or any(column.null_count for column in columns):
        raise DamagedError(f"{where} is no shard of samples: it has {'none' if not len(seed) else 'gaps'}")
    try:
        lineage = json.loads(table.schema.metadata[b"brickyard"])
    except (KeyError, TypeError, ValueError, RecursionError):
        lineage = None
    if not isinstance(lineage, dict):
        raise DamagedError(f"{where} carries no lineage: it was not written by jobs/sample.py")
    seeds, labels = (column.to_numpy().astype(np.int64) for column in (seed, label))
    return Samples(seeds, labels, image.to_pylist(), lineage)
