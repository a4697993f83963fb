"""The k nearest of a set of vectors to each of others: exact, and the same in whatever blocks the set comes.

‖q - b‖² = ‖q‖² + ‖b‖² - 2 q·b is one matrix product for a block, but it rounds as the block is shaped. So it only says
which rows can be among the nearest, with room for all that it may have rounded away; of those the distance is summed
from the differences, in an order that depends on nothing but D. Equal distances are ordered by the row.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError

QUERIES = 256
"""Queries that are held against a block in one product."""
PIECE_ROWS = 256
"""Rows whose differences are held in memory at once."""


class Nearest(NamedTuple):
    """The nearest of each of n queries, the nearest first."""

    squared: NDArray[np.float64]
    """‖q - b‖² [n, k]; infinite where there are fewer than k."""
    row: NDArray[np.int64]
    """[n, k]; -1 where there are fewer."""
    mirrored: NDArray[np.bool_]
    """[n, k]: whether it is the mirror image of the row that is so near."""
    same: NDArray[np.int64]
    """[n]: the lowest row whose picture, or its mirror image, has the same pixels; -1 for none."""

    @staticmethod
    def none(n: int, k: int) -> "Nearest":
        """Return what is known before anything was looked at."""
        return Nearest(np.full((n, k), np.inf), np.full((n, k), -1), np.zeros((n, k), bool), np.full(n, -1))

    def merged(self, other: "Nearest") -> "Nearest":
        """Return the nearest of both, whichever comes first."""
        squared, row, mirrored = (np.concatenate(both, 1) for both in zip(self[:3], other[:3], strict=True))
        order = np.lexsort((row, squared))[:, : self.row.shape[1]]  # along the last axis
        squared, row, mirrored = (np.take_along_axis(values, order, 1) for values in (squared, row, mirrored))
        either = np.maximum(self.same, other.same)  # as long as one has none
        same = np.where((self.same < 0) | (other.same < 0), either, np.minimum(self.same, other.same))
        return Nearest(squared, row, mirrored, same)

    def of(self, queries: slice) -> "Nearest":
        """Return those of some queries."""
        return Nearest(self.squared[queries], self.row[queries], self.mirrored[queries], self.same[queries])


@dataclass(frozen=True, eq=False)
class Queries:
    """n vectors whose neighbours are looked for."""

    features: NDArray[np.float64]
    """[n, D]."""
    own: NDArray[np.int64]
    """[n]: the row that is the query itself, which is no neighbour; -1 if none is."""
    fingerprint: NDArray[np.uint8]
    """[n, 32], of the pixels."""

    @cached_property
    def norms(self) -> NDArray[np.float64]:
        """‖q‖² [n]."""
        return norms(self.features)

    def of(self, which: slice) -> "Queries":
        """Return some of them."""
        return Queries(self.features[which], self.own[which], self.fingerprint[which])


def recut(several: Iterable[Queries], rows: Callable[[int], int]) -> Iterator[Queries]:
    """Yield the same queries in parts of ``rows(D)``, of which the last may be smaller: what was read by files is not
    searched by files, which may be tiny or huge."""
    waiting: list[Queries] = []
    n = 0
    for queries in several:
        start = 0
        while start < len(queries.own):
            size = rows(queries.features.shape[1])
            part = queries.of(slice(start, start + size - n))
            waiting.append(part)
            start, n = start + len(part.own), n + len(part.own)
            if n == size:
                yield _joined(waiting)
                waiting, n = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(several: list[Queries]) -> Queries:
    features, own, fingerprint = zip(*((one.features, one.own, one.fingerprint) for one in several), strict=True)
    return Queries(np.concatenate(features), np.concatenate(own), np.concatenate(fingerprint))


@dataclass(frozen=True, eq=False)
class Block:
    """m rows of the set that neighbours are looked for in."""

    row: NDArray[np.int64]
    """[m], rising."""
    views: list[NDArray[np.float64]]
    """The features [m, D] of each picture, and, if they count as well, those of its mirror image."""
    fingerprints: list[NDArray[np.uint8]]
    """[m, 32], of the pixels of each view."""

    @cached_property
    def norms(self) -> list[NDArray[np.float64]]:
        """‖b‖² [m] of each view."""
        return [norms(view) for view in self.views]

    @cached_property
    def rows_of(self) -> dict[bytes, list[int]]:
        """The two lowest rows that have a fingerprint: one of them is not the query itself."""
        found: dict[bytes, set[int]] = {}
        for prints in self.fingerprints:
            for row, one in zip(self.row.tolist(), prints, strict=True):
                found.setdefault(one.tobytes(), set()).add(row)
        return {one: sorted(rows)[:2] for one, rows in found.items()}


def norms(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ‖x‖² [n] of features [n, D].

    Raises:
        DataError: if one is no finite number.
    """
    found: NDArray[np.float64] = np.einsum("nd,nd->n", features, features)
    if not np.isfinite(found).all():
        raise DataError(f"the features of {int((~np.isfinite(found)).sum())} of {len(found)} pictures are not finite")
    return found


def squared_distances(x: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ‖x - y‖² [m] for x [D] and each y of [m, D]: of each pair the same number, whatever stands beside it."""
    pieces = [np.square(rows[i : i + PIECE_ROWS] - x).sum(1) for i in range(0, len(rows), PIECE_ROWS)]
    return np.concatenate([np.empty(0), *pieces])


def nearest(queries: Queries, block: Block, k: int) -> Nearest:
    """Return the k nearest rows of a block to each query."""
    n = len(queries.features)
    found = Nearest.none(n, k)
    for start in range(0, n, QUERIES):
        part = slice(start, min(start + QUERIES, n))
        for i, chosen in zip(range(n)[part], _candidates(queries, block, part, k), strict=True):
            exact = np.stack([squared_distances(queries.features[i], view[chosen]) for view in block.views])
            squared, rows = exact.min(0), block.row[chosen]
            order = np.lexsort((rows, squared))[:k]
            here = i, slice(0, len(order))
            found.squared[here], found.row[here] = squared[order], rows[order]
            found.mirrored[here] = exact.argmin(0)[order] > 0
    for i, (fingerprint, own) in enumerate(zip(queries.fingerprint, queries.own.tolist(), strict=True)):
        others = [row for row in block.rows_of.get(fingerprint.tobytes(), []) if row != own]
        found.same[i] = others[0] if others else -1
    return found


def _candidates(queries: Queries, block: Block, part: slice, k: int) -> list[NDArray[np.int64]]:
    """Return, for each of some queries, the places in the block that can be among its k nearest, rising."""
    features, own, query_norms = queries.features[part], queries.own[part], queries.norms[part]
    rough = np.full((len(features), len(block.row)), np.inf)
    for view, view_norms in zip(block.views, block.norms, strict=True):
        product = features @ view.T
        product *= -2
        product += view_norms
        np.minimum(rough, product, out=rough)
    rough += query_norms[:, None]
    place = np.searchsorted(block.row, own).clip(max=len(block.row) - 1)
    itself = np.flatnonzero(block.row[place] == own)
    rough[itself, place[itself]] = np.inf
    if k < len(block.row):
        # A product of D terms is off by D ulp of ‖q‖ ‖b‖ at most, and so for the norms and the differences; twice,
        # since what is let in and what is kept out may both be.
        room = 4 * (features.shape[1] + 4) * np.finfo(float).eps * (query_norms + max(n.max() for n in block.norms))
        limit = np.partition(rough, k - 1, axis=1)[:, k - 1] + room
    else:
        limit = np.full(len(features), np.inf)
    return [np.flatnonzero((row <= least) & (row < np.inf)) for row, least in zip(rough, limit, strict=True)]
