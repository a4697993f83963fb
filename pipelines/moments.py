"""The Fréchet distance, from statistics that merge.

The moments n, Σx and Σxxᵀ of sets of features add up to those of their union. The distance is that of the Gaussians
with the same means and covariances, d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Dowson and Landau, 1982); what is
called FID is this on the features of an Inception network (Heusel et al., 2017).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError


@dataclass(frozen=True)
class Moments:
    """n, Σx [D] and Σxxᵀ [D, D] of n feature vectors, in float64."""

    n: int
    sum: NDArray[np.float64]
    outer: NDArray[np.float64]

    @staticmethod
    def of(features: NDArray[np.float64]) -> "Moments":
        """Features are [n, D]."""
        return Moments(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.sum / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance [D, D]; n must be at least 2."""
        centred = self.outer - self.n * np.outer(self.mean, self.mean)
        return centred / (self.n - 1)


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the moments of a union, added up from the first to the last: so they round the same each time."""
    return reduce(add, parts)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return d² of the Gaussians that fit two sets of features.

    Raises:
        DataError: if a set has fewer than two members, or the features differ in number.
    """
    return frechet_distances([a], b)[0]


def frechet_distances(several: Iterable[Moments], b: Moments) -> list[float]:
    """Return :func:`frechet_distance` of several sets from one, whose root is taken once."""
    if b.n < 2:
        raise DataError(f"a Fréchet distance needs at least two pictures on each side, not {b.n}")
    # (Σ₁ Σ₂)^½ has the eigenvalues of (√Σ₂ Σ₁ √Σ₂)^½, which is symmetric: no complex roots, no iteration.
    values, vectors = np.linalg.eigh(b.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return [_distance(a, b, root) for a in several]


def _distance(a: Moments, b: Moments, root: NDArray[np.float64]) -> float:
    if a.n < 2:
        raise DataError(f"a Fréchet distance needs at least two pictures on each side, not {a.n}")
    if a.sum.shape != b.sum.shape:
        raise DataError(f"the pictures differ in size: {a.sum.size} and {b.sum.size} features cannot be compared")
    mixed = np.sqrt(np.linalg.eigvalsh(root @ a.covariance @ root).clip(0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed)
