"""The kernel distance and the balls, block by block on a Ray cluster; :mod:`pipelines.pairs` says what they are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.pairs import Across, Blocks, Own, Tables, across, own
from pipelines.score_config import ScoreJob

Ref = Any
"""Of an object in Ray's store, which puts on disk what its memory has no room for."""


class Kept:
    """The features of a set, in blocks in Ray's object store."""

    def __init__(self) -> None:
        self.refs: list[Ref] = []
        self.sizes: list[int] = []
        self.parts: list[int] = []

    def add(self, part: int, features: NDArray[np.float32]) -> None:
        """Keep the features [n, D] of a part of the set, if there are any."""
        if len(features):
            self.refs.append(ray.put(features))
            self.sizes.append(len(features))
            self.parts.append(part)

    @property
    def n(self) -> int:
        return sum(self.sizes)


def check_neighbours(job: ScoreJob, sizes: Sequence[int]) -> None:
    """Raise DataError unless sets of these sizes have as many neighbours, and pairs, as are looked at."""
    least = 1 + (job.neighbours if {"precision-recall", "density-coverage"} & set(job.metrics) else 1)
    if job.needs_pairs and min(sizes) < least:
        raise DataError(f"{', '.join(job.metrics)} of sets of {sizes[0]} and {sizes[1]} pictures needs {least} in each")


def hold_against(job: ScoreJob, samples: Kept, reference: Kept, groups: int) -> Tables:
    """Hold every picture against every other that the metrics ask for.

    Args:
        job: which metrics, and how many neighbours.
        samples: what they kept.
        reference: what it kept.
        groups: of the samples; part i is of group i mod ``groups``.
    """
    kernel = "kid" in job.metrics
    balls = bool({"precision-recall", "density-coverage"} & set(job.metrics))
    recall = "precision-recall" in job.metrics
    of_samples = _own(samples, job.neighbours if recall else 0, kernel)
    of_reference = _own(reference, job.neighbours if balls else 0, kernel)
    limits = [ray.put(one.limit) for one in of_reference] if balls else None
    task = ray.remote(num_cpus=1)(_across)
    found: list[Across] = ray.get(
        [
            task.remote([ref], reference.refs, limits, of_samples[i].limit if recall else None, kernel)
            for i, ref in enumerate(samples.refs)
        ]
    )
    return Tables(
        group=np.array(samples.parts) % groups,
        within_samples=np.stack([one.kernel for one in of_samples]),
        within_reference=float(sum(one.kernel.sum() for one in of_reference)),
        across=found,
        m=reference.n,
    )


def _own(kept: Kept, k: int, kernel: bool) -> list[Own]:
    if not (k or kernel):
        return [Own(np.zeros(0), np.zeros(len(kept.refs))) for _ in kept.refs]
    task = ray.remote(num_cpus=1)(_own_of)
    return ray.get([task.remote(kept.refs, block, k, kernel) for block in range(len(kept.refs))])  # type: ignore[no-any-return]


def _own_of(refs: list[Ref], block: int, k: int, kernel: bool) -> Own:
    return own(Blocks(refs, ray.get), block, k, kernel)


def _across(
    block: list[Ref],
    reference: list[Ref],
    limits: list[Ref] | None,
    own_limit: NDArray[np.float64] | None,
    kernel: bool,
) -> Across:
    x = Blocks(block, ray.get)[0]
    return across(x, Blocks(reference, ray.get), Blocks(limits, ray.get) if limits else None, own_limit, kernel)
