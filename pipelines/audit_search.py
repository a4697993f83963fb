"""The nearest of many pictures to many others, as Ray Data jobs over blocks.

First the pictures that are asked about become vectors, and go into Ray's object store, in parts of one size, where all
tasks of a node see the same memory. Then each task reads one block of the data, makes it into vectors, once, and holds
all parts against it; what it tells is merged as it comes. So nobody holds the data set, and a task holds one block and
one part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipelines.errors import DataError
from pipelines.features import Extract, FeatureConfig
from pipelines.fingerprint import SIZE, fingerprints
from pipelines.images import Pixels
from pipelines.neighbours import Block, Nearest, Queries, nearest, recut
from pipelines.picture_sets import DataPictures

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
class DataBlocks:
    """Reads the blocks of the data set that neighbours are looked for in."""

    data: DataPictures
    features: FeatureConfig
    dimensions: int
    """D, of the features."""
    block_rows: int
    left_out: NDArray[np.int64]
    """Rows that are none of it, rising."""
    mirrored: bool

    @property
    def count(self) -> int:
        return -(-self.data.n // self.block_rows)

    def __call__(self, block: int) -> Block:
        rows = np.arange(block * self.block_rows, min((block + 1) * self.block_rows, self.data.n))
        rows = np.setdiff1d(rows, self.left_out, assume_unique=True)
        views = [np.empty((len(rows), self.dimensions)) for _ in range(1 + self.mirrored)]
        prints = [np.empty((len(rows), SIZE), np.uint8) for _ in views]
        found = np.empty(len(rows), np.int64)
        n = 0
        for here, pixels in self.data.pieces(rows, PIECE_IMAGES):
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
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *self.sizes])

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
        return np.arange(self._starts[part], self._starts[part + 1])


class Read(NamedTuple):
    """n pictures that are asked about."""

    pixels: Pixels
    """uint8 [n, H, W, C]."""
    own: NDArray[np.int64]
    """[n]: the row of the data that each is itself; -1 if none is."""
    seed: NDArray[np.int64]
    """[n], of a sample; otherwise -1."""
    label: NDArray[np.int64]
    """[n], of a sample; otherwise -1."""


@dataclass(frozen=True)
class Ask:
    """The task: the number of a file to the vectors of its pictures."""

    read: Callable[[int], Read]
    features: FeatureConfig

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        pixels, own, seed, label = self.read(row["id"])
        parts = [vectors(pixels[i : i + PIECE_IMAGES], self.features) for i in range(0, len(own), PIECE_IMAGES)]
        features = np.concatenate(parts) if parts else np.empty((0, 0))
        return {"own": own, "seed": seed, "label": label, "features": features, "fingerprint": fingerprints(pixels)}


def ask(
    read: Callable[[int], Read], files: int, images: int, features: FeatureConfig
) -> tuple[Asked, NDArray[np.int64], NDArray[np.int64]]:
    """Make pictures into vectors in Ray's object store; the order is kept.

    Args:
        read: reads the pictures of the files 0..files-1.
        files: how many there are.
        images: pictures in all of them.
        features: what is made of each.

    Returns:
        The vectors, and the seed and the label of each picture, int64 [n].
    """
    seed, label = ([np.empty(0, np.int64)] for _ in range(2))

    def queries() -> Iterator[Queries]:
        for row in _in_order(Ask(read, features), files, features):
            seed.append(row["seed"])
            label.append(row["label"])
            yield Queries(row["features"], row["own"], row["fingerprint"])

    asked = Asked([], [], 0)
    for part in recut(queries(), lambda numbers: block_rows(images, numbers)):  # files may be tiny, or huge
        asked += Asked([ray.put(part)], [len(part.own)], part.features.shape[1])
    return asked, np.concatenate(seed), np.concatenate(label)


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


def search(
    asked: Asked, read: Callable[[int], Block], blocks: int, k: int, features: FeatureConfig | None = None
) -> tuple[Nearest, int]:
    """Return the k nearest of what blocks 0..blocks-1 hold to each of those that are asked about, in their order.

    Args:
        asked: these.
        read: reads a block; ``asked`` itself to look for neighbours among them, a part being a block.
        blocks: how many there are.
        k: how many neighbours.
        features: what ``read`` makes of pictures, if it does.

    Returns:
        The nearest, and how many rows there were.
    """
    found, rows = Nearest.none(asked.count, k), 0
    for told in _in_order(Compare(read, asked, k, read is asked), blocks, features):
        rows += int(told["rows"])
        found = found.merged(Nearest(*(told[name] for name in Nearest._fields)))
    return found, rows


class _Actor:
    """Does a task, in a process that keeps what it has loaded for it."""

    def __init__(self, task: Callable[[dict[str, int]], dict[str, Any]]) -> None:
        self.task = task

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        return self.task(row)


def _in_order(
    task: Callable[[dict[str, int]], dict[str, Any]], count: int, features: FeatureConfig | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what a task makes of 0..count-1; one that makes use of features is done where these say."""
    if not count:
        return
    numbers = ray.data.range(count, override_num_blocks=count)
    if features is None or features.kind == "pixels":
        dataset = numbers.map(task)
    else:
        dataset = numbers.map(
            _Actor,
            fn_constructor_args=(task,),
            compute=ActorPoolStrategy(size=min(features.actors, count)),
            num_gpus=1 if features.use_gpu else 0,
        )
    dataset.context.execution_options.preserve_order = True
    yield from dataset.iter_rows()
