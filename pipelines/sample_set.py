"""A finished set of samples, read: its manifest, and its shards, each proved to be what was written."""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import DamagedError, DataError
from pipelines.images import BadImageError, Pixels, decode
from pipelines.storage import Folder

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
"""Of a finished set; the one without content comes last."""
KEYS = {"seeds", "shape", "lineage", "files"}


class Samples(NamedTuple):
    """The samples of a shard."""

    seed: NDArray[np.int64]
    """[n]."""
    label: NDArray[np.int64]
    """[n], an index into the labels that the network knows; -1 for none."""
    image: list[bytes]
    """The PNG of each."""


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
        found = SampleSet(folder, folder.get(MANIFEST))
        try:
            about = json.loads(found.content)
        except ValueError as error:
            raise DataError(f"{folder.url}/{MANIFEST} is not the manifest of samples: {error}") from error
        if not isinstance(about, dict) or not about.keys() >= KEYS or not about["files"]:
            raise DataError(f"{folder.url}/{MANIFEST} is not the manifest of samples: it must have {sorted(KEYS)}")
        return found

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the manifest says."""
        return dict(json.loads(self.content))

    @property
    def digest(self) -> str:
        """The sha256 of the manifest, and so of all pictures."""
        return hashlib.sha256(self.content).hexdigest()

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
        file = self.about["files"][part]
        data = self.folder.get(file["name"])
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
        seed, label = (table[name].to_numpy().astype(np.int64) for name in ("seed", "label"))
        return Samples(seed, label, table["image"].to_pylist())
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DamagedError(f"{where} is no shard of samples: {error}") from error
