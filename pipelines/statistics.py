"""Sets of pictures to statistics of their features: a Ray Data reduction.

A set is cut into parts. Each task turns one into the moments of its features, of all or by label, and, where every
picture is to be held against every other, into the features themselves. The driver adds the moments up in order, so
that the sums round the same each time; it and each task hold some tables of D × D, one for each label and each group
of parts, however many pictures there are.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipelines.errors import DataError
from pipelines.features import Extract, FeatureConfig
from pipelines.intervals import parts
from pipelines.moments import Moments
from pipelines.picture_sets import Pictures
from pipelines.plan import held_out_rows

MAX_BYTES = 1 << 30
"""Of the moments by label that a task may hold."""

log = logging.getLogger("brickyard.scoring")


class Part(NamedTuple):
    """What becomes of a part of a set."""

    moments: list[Moments]
    """Of all its pictures; or of those without label, and then of those of each label. Empty if not asked for."""
    features: NDArray[np.float32]
    """[n, D], of the pictures that are held against others; none if not asked for."""


@dataclass(frozen=True)
class ReadPart:
    """The task: the number of a part to its pictures."""

    pictures: Pictures
    bounds: list[tuple[int, int]]
    pairs_images: int
    """Pictures of the set whose features are kept; 0 for all."""

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        found = self.pictures.read(*self.bounds[row["id"]])
        kept = np.ones(len(found.row), bool)
        if 0 < self.pairs_images < self.pictures.n:
            kept = np.isin(found.row, held_out_rows(self.pictures.n, self.pairs_images))
        return {"image": found.image, "label": found.label, "kept": kept}


class Summarize:
    """The task, or the actor: pictures to the moments of their features, and to these."""

    def __init__(self, features: FeatureConfig, labels: int, moments: bool, keep: bool) -> None:
        self.features, self.labels, self.moments, self.keep = features, labels, moments, keep

    @cached_property
    def extract(self) -> Extract:
        # Not in the constructor: what fails there is told as a dead actor, and tried again.
        return self.features.load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found = self.extract(row["image"])
        told: dict[str, Any] = {"n": np.zeros(0, np.int64)}
        if self.moments:
            several = self._moments(found, row["label"])
            told["n"] = np.array([one.n for one in several])
            told["sum"] = np.stack([one.sum for one in several])
            told["outer"] = np.stack([one.outer for one in several])
        if self.keep:  # as bytes: Arrow has no table of no rows
            told["features"] = found[row["kept"]].astype(np.float32).tobytes()
            told["width"] = found.shape[1]
        return told

    def _moments(self, found: NDArray[np.float64], label: NDArray[np.int64]) -> list[Moments]:
        if not self.labels:
            return [Moments.of(found)]
        size = 8 * (self.labels + 1) * found.shape[1] ** 2
        if size > MAX_BYTES:
            raise DataError(
                f"per_class needs moments of {self.labels} labels of {found.shape[1]} features, {size >> 20} MB, more "
                f"than {MAX_BYTES >> 20}: take --no-per-class, or features that are fewer"
            )
        return [Moments.of(found[label == one]) for one in range(-1, self.labels)]


def statistics(
    pictures: Pictures, features: FeatureConfig, *, labels: int, moments: bool, keep: bool, pairs_images: int
) -> Iterator[Part]:
    """Yield what becomes of each part of a set, in order.

    Args:
        pictures: the set.
        features: what is made of each.
        labels: how many there are, for moments by label; 0 for moments of all.
        moments: whether these are asked for.
        keep: whether features are.
        pairs_images: of how many pictures, evenly spread; 0 for all.
    """
    bounds = parts(pictures.n, int(np.prod(pictures.shape)))
    read = ReadPart(pictures, bounds, pairs_images)
    numbers = ray.data.range(len(bounds), override_num_blocks=len(bounds)).map(read)
    what = (features, labels, moments, keep)
    if features.kind == "pixels":
        dataset = numbers.map(Summarize(*what))
    else:
        dataset = numbers.map(
            Summarize,
            fn_constructor_args=what,
            compute=ActorPoolStrategy(size=min(features.actors, len(bounds))),
            num_gpus=1 if features.use_gpu else 0,
        )
    dataset.context.execution_options.preserve_order = True
    for number, row in enumerate(dataset.iter_rows()):
        log.debug("score: part %d of %d of %s", number + 1, len(bounds), pictures.folder.url)
        yield _part(row)


def _part(row: dict[str, Any]) -> Part:
    several = [Moments(int(n), row["sum"][i], row["outer"][i]) for i, n in enumerate(row["n"])]
    flat = np.frombuffer(row.get("features", b""), np.float32)
    return Part(several, flat.reshape(-1, row.get("width", 1)))
