"""What holds every picture against every other: the kernel distance, and balls around pictures.

*KID* (Bińkowski et al., 2018) is the squared maximum mean discrepancy for the kernel k(x, y) = (x·y/D + 1)³, without
bias: the mean of k over the pairs within one set, plus that within the other, minus twice that across. All pairs are
taken, in place of random subsets: that has the least variance, and is the same each time.

*Balls* around the pictures of a set reach to the k-th nearest neighbour in it. Precision is the share of the samples
that lie in a ball of the reference, recall that of the reference in a ball of the samples (Kynkäänniemi et al., 2019);
density is the number of balls of the reference that a sample lies in, over k, and coverage the share of the balls of
the reference in which any sample lies (Naeem et al., 2020). An odd picture makes the first two larger than it should.

A set is a sequence of blocks. Whoever computes holds two blocks and a table of ``ROWS`` × ``ROWS``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

ROWS = 1024
"""Pictures of a block that are held against as many of another at once."""
SLACK = 1e-13
"""What rounding cannot tell from the border of a ball lies in it: a share of the squared lengths that d² is made of."""
T = TypeVar("T")


@dataclass(frozen=True)
class Blocks(Generic[T]):
    """Something of each block of a set, which is fetched when it is needed."""

    refs: Sequence[T]
    get: Callable[[T], NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, block: int) -> NDArray[np.float64]:
        return self.get(self.refs[block]).astype(np.float64, copy=False)


@dataclass(frozen=True)
class Own:
    """A block against its own set."""

    limit: NDArray[np.float64]
    """[n], the square of the radius of the ball around each picture, with the slack."""
    kernel: NDArray[np.float64]
    """[blocks], Σk over the pairs with each block, of no picture with itself."""


@dataclass(frozen=True)
class Across:
    """A block of the samples against the reference."""

    n: int
    inside: int
    """Samples in any ball of the reference."""
    balls: int
    """Balls of the reference that samples are in, Σ over both."""
    kernel: float
    """Σk over the pairs."""
    covered: NDArray[np.bool_]
    """[m], whether any of these samples is in the ball of each picture of the reference."""
    recalled: NDArray[np.bool_]
    """[m], whether each picture of the reference is in a ball of any of these samples."""


def own(features: Blocks[T], block: int, k: int, kernel: bool) -> Own:
    """Hold a block against its set; k = 0 for no balls."""
    x = features[block]
    nearest = np.full((len(x), k), np.inf)
    sums = np.zeros(len(features))
    for other in range(len(features)):
        y = x if other == block else features[other]
        for here, there, gram in _tables(x, y):
            itself = np.equal.outer(here, there) if other == block else None
            if kernel:
                of_pairs = _kernel(gram, x.shape[1])
                sums[other] += of_pairs.sum() if itself is None else of_pairs.sum(where=~itself)
            if k:
                apart = _apart(x[here], y[there], gram)
                if itself is not None:
                    apart[itself] = np.inf
                both = np.concatenate([nearest[here], apart], axis=1)
                nearest[here] = np.partition(both, k - 1, axis=1)[:, :k]
    if not k:
        return Own(np.zeros(0), sums)
    radius = nearest.max(axis=1)
    return Own(radius + SLACK * (radius + np.square(x).sum(1)), sums)


def across(
    x: NDArray[np.float64],
    reference: Blocks[T],
    limits: Blocks[T] | None,
    own_limit: NDArray[np.float64] | None,
    kernel: bool,
) -> Across:
    """Hold a block of the samples against the reference.

    Args:
        x: the block, [n, D].
        reference: the features.
        limits: the limits of their balls, or None for no balls.
        own_limit: those of the block's, [n], or None for no recall.
        kernel: whether Σk is asked for.
    """
    balls, total = np.zeros(len(x), np.int64), 0.0
    covered, recalled = [], []
    for block in range(len(reference)):
        y = reference[block]
        limit = limits[block] if limits else None
        hit, back = np.zeros(len(y), bool), np.zeros(len(y), bool)
        for here, there, gram in _tables(x, y):
            if kernel:
                total += float(_kernel(gram, x.shape[1]).sum())
            if limit is None:
                continue
            apart = _apart(x[here], y[there], gram)
            within = apart <= limit[there]
            balls[here] += within.sum(1)
            hit[there] |= within.any(0)
            if own_limit is not None:
                back[there] |= (apart <= own_limit[here, None]).any(0)
        covered.append(hit)
        recalled.append(back)
    return Across(
        len(x), int((balls > 0).sum()), int(balls.sum()), total, np.concatenate(covered), np.concatenate(recalled)
    )


def _tables(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield rows of x, rows of y and the table of their products, piece by piece."""
    for i in range(0, len(x), ROWS):
        for j in range(0, len(y), ROWS):
            here, there = np.arange(i, min(i + ROWS, len(x))), np.arange(j, min(j + ROWS, len(y)))
            yield here, there, x[i : i + ROWS] @ y[j : j + ROWS].T


def _kernel(gram: NDArray[np.float64], D: int) -> NDArray[np.float64]:
    base = gram / D + 1
    return base * base * base


def _apart(x: NDArray[np.float64], y: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared distances, [n, m]."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * gram
    return squares.clip(0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tables:
    """All that was found, from which the values follow, of all samples or without one group of them."""

    group: NDArray[np.int64]
    """Of each block of the samples."""
    within_samples: NDArray[np.float64]
    """Σk of each block of the samples with each, [blocks, blocks]."""
    within_reference: float
    """Σk over the pairs of the reference."""
    across: list[Across]
    """Of each block of the samples."""
    m: int
    """Pictures of the reference."""

    def kid(self, without: int | None = None) -> float:
        """Return MMD², which may be negative: it has no bias."""
        keep = self._keep(without)
        n = self._n(keep)
        same = self.within_samples[np.ix_(keep, keep)].sum() / (n * (n - 1))
        mixed = sum(self.across[i].kernel for i in keep) / (n * self.m)
        return float(same + self.within_reference / (self.m * (self.m - 1)) - 2 * mixed)

    def precision(self, without: int | None = None) -> float:
        """Return the share of the samples in a ball of the reference."""
        keep = self._keep(without)
        return float(sum(self.across[i].inside for i in keep) / self._n(keep))

    def density(self, k: int, without: int | None = None) -> float:
        """Return the number of balls that a sample is in, over k."""
        keep = self._keep(without)
        return float(sum(self.across[i].balls for i in keep) / (k * self._n(keep)))

    def coverage(self, without: int | None = None) -> float:
        """Return the share of the balls of the reference with a sample in them."""
        return float(np.any([self.across[i].covered for i in self._keep(without)], axis=0).mean())

    def recall(self) -> float:
        """Return the share of the reference in a ball of the samples."""
        return float(np.any([one.recalled for one in self.across], axis=0).mean())

    def _keep(self, without: int | None) -> NDArray[np.int64]:
        return np.flatnonzero(self.group != (-1 if without is None else without))

    def _n(self, keep: NDArray[np.int64]) -> int:
        return sum(self.across[i].n for i in keep)
