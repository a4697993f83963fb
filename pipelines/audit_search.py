"""The nearest of many pictures to many others, as Ray Data jobs over blocks.

First the pictures that are asked about become vectors, part by part, and go into Ray's object store, where all tasks of
a node see the same memory. Then each task reads one block of the data, makes it into vectors, once, and holds all parts
against it; what it tells is merged as it comes. So nobody holds the data set, and a task holds one block and one part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.features import Extract, FeatureConfig
from pipelines.fingerprint import SIZE, fingerprints
from pipelines.images import Pixels, View
from pipelines.manifest import Manifest, RowGroups
from pipelines.neighbours import Block, Nearest, Queries, nearest
from pipelines.storage import Folder

BLOCK_BYTES = 128 << 20
"""What the vectors of a block may take."""
BLOCK_ROWS = 8192
"""Rows of a block at most."""
MIN_BLOCK_ROWS = 1024
PIECE_IMAGES = 256
"""Pictures that are decoded, and made into vectors, at once."""


@lru_cache(maxsize=1)
def extractor(features: FeatureConfig) -> Extract:
    """Return the extractor, which a process loads once."""
    return features.load()


def vectors(pixels: Pixels, features: FeatureConfig) -> NDArray[np.float64]:
    """Return the features [n, D] of pictures [n, H, W, C] in float64, in which they are compared."""
    return np.ascontiguousarray(extractor(features)(pixels), np.float64)


def block_rows(rows: int, numbers: int) -> int:
    """Return how many of so many rows, each of so many numbers, make a block: few enough for a task's memory, many
    enough for a matrix product, and so that all CPUs of the cluster have some."""
    fit = max(BLOCK_BYTES // (8 * max(numbers, 1)), 1)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return min(fit, BLOCK_ROWS, max(MIN_BLOCK_ROWS, -(-rows // (2 * cpus))))


@dataclass(frozen=True)
class DataReader:
    """Reads rows of a data set as the network saw them."""

    folder: Folder
    manifest: Manifest
    view: View

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
        """Yield rows, a few at a time, and their pictures; a picture that is unusable, and its row, are left out."""
        kept: RowGroups = {}
        for start in range(0, len(rows), PIECE_IMAGES):
            asked = rows[start : start + PIECE_IMAGES]
            found = self.manifest.read(self.folder, asked, self.view, kept=kept)
            usable = found.row == asked  # what would stand in for it stands for itself
            yield asked[usable], found.image[usable]
            for key in list(kept)[:-1]:  # the next piece may go on in the last row group
                del kept[key]


@dataclass(frozen=True)
class DataBlocks:
    """Reads the blocks of the data set that neighbours are looked for in."""

    data: DataReader
    features: FeatureConfig
    dimensions: int
    """D, of the features."""
    block_rows: int
    left_out: NDArray[np.int64]
    """Rows that are none of it, rising."""
    mirrored: bool

    @property
    def count(self) -> int:
        return -(-self.data.manifest.rows // self.block_rows)

    def __call__(self, block: int) -> Block:
        rows = np.arange(block * self.block_rows, min((block + 1) * self.block_rows, self.data.manifest.rows))
        rows = np.setdiff1d(rows, self.left_out, assume_unique=True)
        views = [np.empty((len(rows), self.dimensions)) for _ in range(1 + self.mirrored)]
        prints = [np.empty((len(rows), SIZE), np.uint8) for _ in views]
        found = np.empty(len(rows), np.int64)
        n = 0
        for here, pixels in self.data.read(rows):
            part = slice(n, n := n + len(here))
            found[part] = here
            for view, print_, seen in zip(views, prints, (pixels, pixels[:, :, ::-1]), strict=False):
                view[part], print_[part] = vectors(seen, self.features), fingerprints(seen)
        return Block(found[:n], [view[:n] for view in views], [print_[:n] for print_ in prints])


@dataclass(frozen=True)
class Asked:
    """Pictures that are asked about, as vectors in Ray's object store, in parts."""

    parts: list[Any]
    """References to :class:`pipelines.neighbours.Queries`."""
    sizes: list[int]
    """Pictures of each part."""
    dimensions: int
    """D; 0 as long as there are no pictures."""

    @property
    def count(self) -> int:
        return sum(self.sizes)

    def __add__(self, other: "Asked") -> "Asked":
        if self.count and other.count and self.dimensions != other.dimensions:
            raise DataError(f"pictures with {self.dimensions} and {other.dimensions} features cannot be compared")
        return Asked(self.parts + other.parts, self.sizes + other.sizes, self.dimensions or other.dimensions)

    def queries(self, part: int, among_themselves: bool) -> Queries:
        """Return a part; its pictures may be looked for among all that are asked about, whose rows they then are."""
        found: Queries = ray.get(self.parts[part])
        return replace(found, own=self._rows(part)) if among_themselves else found

    def __call__(self, part: int) -> Block:
        """Return a part as a block of the set of all that are asked about."""
        found: Queries = ray.get(self.parts[part])
        return Block(self._rows(part), [found.features], [found.fingerprint])

    def _rows(self, part: int) -> NDArray[np.int64]:
        start = sum(self.sizes[:part])
        return np.arange(start, start + self.sizes[part])


@dataclass(frozen=True)
class Ask:
    """The task: the number of a part to its vectors."""

    read: Callable[[int], tuple[NDArray[np.int64], Pixels]]
    """Returns what the own row of each picture is, and the pictures."""
    features: FeatureConfig

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        own, pixels = self.read(row["id"])
        parts = [vectors(pixels[i : i + PIECE_IMAGES], self.features) for i in range(0, len(own), PIECE_IMAGES)]
        features = np.concatenate(parts) if parts else np.empty((0, 0))
        return {"own": own, "features": features, "fingerprint": fingerprints(pixels)}


def ask(read: Callable[[int], tuple[NDArray[np.int64], Pixels]], parts: int, features: FeatureConfig) -> Asked:
    """Make pictures, read by ``read`` in parts 0..parts-1, into vectors in Ray's object store; the order is kept."""
    asked = Asked([], [], 0)
    for row in _in_order(Ask(read, features), parts):
        queries = Queries(row["features"], row["own"], row["fingerprint"])
        if len(queries.own):
            asked += Asked([ray.put(queries)], [len(queries.own)], queries.features.shape[1])
    return asked


@dataclass(frozen=True)
class Compare:
    """The task: the number of a block to the nearest in it of all that are asked about."""

    read: Callable[[int], Block]
    asked: Asked
    k: int
    among_themselves: bool

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        block, found = self.read(row["id"]), Nearest.none(self.asked.count, self.k)
        if len(block.row):
            parts = range(len(self.asked.parts))
            told = [nearest(self.asked.queries(part, self.among_themselves), block, self.k) for part in parts]
            found = Nearest(*(np.concatenate(column) for column in zip(*told, strict=True)))
        return {"rows": len(block.row), **found._asdict()}


def search(asked: Asked, read: Callable[[int], Block], blocks: int, k: int) -> tuple[Nearest, int]:
    """Return the k nearest of what blocks 0..blocks-1 hold to each of those that are asked about, in their order.

    Args:
        asked: these.
        read: reads a block; ``asked`` itself to look for neighbours among them, a part being a block.
        blocks: how many there are.
        k: how many neighbours.

    Returns:
        The nearest, and how many rows there were.
    """
    found, rows = Nearest.none(asked.count, k), 0
    for told in _in_order(Compare(read, asked, k, read is asked), blocks):
        rows += int(told["rows"])
        found = found.merged(Nearest(*(told[name] for name in Nearest._fields)))
    return found, rows


def _in_order(task: Callable[[dict[str, int]], dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    if count:
        dataset = ray.data.range(count, override_num_blocks=count).map(task)
        dataset.context.execution_options.preserve_order = True
        yield from dataset.iter_rows()
