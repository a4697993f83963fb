"""What an audit concludes from distances: which samples are copies, how many there would be of pictures that are new.

A distance alone says little: in some places of the data everything is near. So what counts is how much nearer the
nearest training image x₁ is than the training images around the sample in general,

    r(s) = d(s, x₁) / mean of d(s, x₁) … d(s, x_k).

This is the distance of Carlini et al., "Extracting training data from diffusion models" (2023), who take k = 50 and
look at what is below ½. With k = 2, r < ½ says d(s, x₁) < d(s, x₂) / 3, as Yoon et al., "Diffusion probabilistic models
generalize when they fail to memorize" (2023), have it; but that overlooks a copy of what is in the data twice. Here k
is 50 and the threshold a third. Of the 1,797 digits, each compared with the others, 205 are below ½ and 8 below ⅓; of
copies of them with a noise of 16 in 255 on each pixel 94 % are below ⅓, of those with 8 all.

Data have near-duplicates of their own, of which r knows nothing. So pictures that the network never saw are judged in
the same way, and only what the samples have beyond them says something: the three-sample view of Meehan et al., "A
non-parametric test to detect data-copying in generative models" (2020), whose statistic is ``nearer_than_control``.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.neighbours import Nearest

Z = 1.959964
"""Of a normal distribution 95 % lie within so many standard deviations."""


class Judged(NamedTuple):
    """n pictures, judged by their distances to the training images."""

    row: NDArray[np.int64]
    """[n], of the nearest training image."""
    mirrored: NDArray[np.bool_]
    """[n]: whether it is its mirror image that is so near."""
    distance: NDArray[np.float64]
    """[n], to it."""
    around: NDArray[np.float64]
    """[n], the mean distance to the k nearest."""
    ratio: NDArray[np.float64]
    """[n], the one over the other."""
    same: NDArray[np.int64]
    """[n], the lowest row with the same pixels; -1 for none."""
    copy: NDArray[np.bool_]
    """[n]."""


def judge(found: Nearest, threshold: float) -> Judged:
    """Judge pictures by their nearest training images, of which there must be two at least."""
    distances, there = np.sqrt(found.squared), np.isfinite(found.squared)
    around = np.where(there, distances, 0).sum(1) / there.sum(1)
    # Where all k are at no distance, there is nothing to divide by, and no doubt.
    ratio = np.divide(distances[:, 0], around, out=np.zeros(len(around)), where=around > 0)
    copy = (ratio < threshold) | (found.same >= 0)
    return Judged(found.row[:, 0], found.mirrored[:, 0], distances[:, 0], around, ratio, found.same, copy)


class Twins(NamedTuple):
    """n samples, judged by their distances to each other."""

    other: NDArray[np.int64]
    """[n], of the nearest other sample; -1 if there is no other."""
    distance: NDArray[np.float64]
    """[n], to it."""
    same: NDArray[np.int64]
    """[n], the first other sample with the same pixels; -1 for none."""
    near: NDArray[np.bool_]
    """[n]: whether the two are nearly alike, by the measure that makes a copy of a sample so near to a training
    image."""


def judge_twins(found: Nearest, judged: Judged, threshold: float) -> Twins:
    """Judge samples by their nearest other sample. What is near is measured on the data, not on the other samples:
    where these all are alike, that too is to be noticed."""
    distance = np.sqrt(found.squared[:, 0])
    near = (distance < threshold * judged.around) | (found.same >= 0)
    return Twins(found.row[:, 0], distance, found.same, near)


def share(which: NDArray[np.bool_]) -> dict[str, Any]:
    """Return how many of n pictures, their share, and the interval of 95 % that Wilson (1927) gives it."""
    n, p = len(which), float(which.mean())
    middle, half = p + Z**2 / (2 * n), Z * float(np.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n)))
    low, high = (max((middle - half) / (1 + Z**2 / n), 0.0), min((middle + half) / (1 + Z**2 / n), 1.0))
    return {"count": int(which.sum()), "share": p, "interval_95": [round(low, 6), round(high, 6)]}


def group(judged: Judged) -> dict[str, Any]:
    """Return what is told of a group of pictures."""
    quantiles = np.quantile(judged.distance, (0, 0.01, 0.5))
    return {
        "n": len(judged.copy),
        "copies": share(judged.copy),
        "identical": int((judged.same >= 0).sum()),
        "distance": dict(zip(("least", "percentile_1", "median"), map(float, quantiles), strict=True)),
    }


def nearer(samples: NDArray[np.float64], control: NDArray[np.float64]) -> float:
    """Return how often a sample is nearer to the training images than a picture of the control, ties half: 0.5 if the
    samples are as new as those, 1 if each is nearer than all of them (Mann and Whitney's U over n m)."""
    ordered = np.sort(control)
    left, right = (np.searchsorted(ordered, samples, side) for side in ("left", "right"))
    return float((len(ordered) - (left + right) / 2).mean() / len(ordered))


def by_label(label: NDArray[np.int64], judged: Judged, twins: Twins, names: list[str]) -> dict[str, dict[str, int]]:
    """Return the counts of each label that samples have; nothing for samples without labels."""
    return {
        names[one] if one < len(names) else str(one): {
            "samples": int((label == one).sum()),
            "copies": int(judged.copy[label == one].sum()),
            "near_duplicates": int(twins.near[label == one].sum()),
        }
        for one in np.unique(label[label >= 0]).tolist()
    }


def table(seed: NDArray[np.int64], label: NDArray[np.int64], judged: Judged, twins: Twins) -> Any:
    """Return what is known of each sample, a row each."""

    def seed_of(index: NDArray[np.int64]) -> Any:
        return pa.array(seed[index], mask=index < 0)

    return pa.table(
        {
            "seed": seed,
            "label": pa.array(label, pa.int32()),
            "row": judged.row,
            "mirrored": judged.mirrored,
            "distance": judged.distance,
            "ratio": judged.ratio,
            "copy": judged.copy,
            "identical_row": pa.array(judged.same, mask=judged.same < 0),
            "nearest_seed": seed_of(twins.other),
            "nearest_seed_distance": pa.array(twins.distance, mask=twins.other < 0),
            "near_duplicate": twins.near,
            "identical_seed": seed_of(twins.same),
        }
    )
