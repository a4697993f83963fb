"""The closest pairs that an audit found, side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.audit_report import Twins
from pipelines.figures import blank, png
from pipelines.images import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

COLUMNS = 6
"""Pairs in a row."""


class Pair(NamedTuple):
    """Two pictures that are near each other."""

    left: Pixels
    """uint8 [H, W, C]."""
    right: Pixels
    who: str
    """Which two they are."""
    near: str
    """How near."""
    flagged: bool
    """Whether that is too near."""


class Alike(NamedTuple):
    """Two samples, the one the nearest to the other."""

    first: int
    """The place of the one in the set, before that of the other."""
    second: int
    distance: float
    near: bool
    """Whether one of them is nearly the other, by what lies around it."""


def closest_samples(twins: Twins, most: int) -> list[Alike]:
    """Return the closest pairs of samples, each once, the closest first."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(twins.distance, kind="stable").tolist():
        if (other := int(twins.other[i])) >= 0:
            pairs.setdefault((min(i, other), max(i, other)), []).append(i)
    # A sample of a pair may itself be nearer to a third: only those count here whose nearest is the other.
    return [
        Alike(*pair, float(twins.distance[who[0]]), any(bool(twins.near[i]) for i in who))
        for pair, who in list(pairs.items())[:most]
    ]


def pairs_of_samples(alike: Sequence[Alike], seed: NDArray[np.int64], drawn: Mapping[int, Pixels]) -> list[Pair]:
    """Return pairs of samples with their pictures, by their places in the set."""
    return [
        Pair(drawn[a], drawn[b], f"seed {seed[a]} | seed {seed[b]}", f"d {distance:.3g}", near)
        for a, b, distance, near in alike
    ]


def pairs_figure(with_data: Sequence[Pair], with_each_other: Sequence[Pair]) -> bytes:
    """Draw samples beside the training images nearest to them, and beside each other, as a PNG file."""
    parts = [
        ("samples, each beside the training image nearest to it", with_data),
        ("samples, each beside the sample nearest to it", with_each_other),
    ]
    parts = [(title, pairs) for title, pairs in parts if pairs]
    heights = [-(-len(pairs) // COLUMNS) * 1.15 + 0.4 for _, pairs in parts]
    figure = blank(1.85 * COLUMNS, sum(heights))
    places: Any = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)
    for place, (title, pairs) in zip(places[:, 0], parts, strict=True):
        _draw(place, title, pairs)
    return png(figure)


def _draw(place: "SubFigure", title: str, pairs: Sequence[Pair]) -> None:
    place.suptitle(f"{title} (red: too near)", fontsize=10)
    grid: Any = place.subplots(-(-len(pairs) // COLUMNS), COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, pair in zip(grid.flat, pairs, strict=False):
        height, width, channels = pair.left.shape
        gap = np.full((height, max(1, width // 8), channels), 255, np.uint8)
        both = np.concatenate([pair.left, gap, pair.right], axis=1)
        axes.imshow(both.squeeze(-1) if channels == 1 else both, cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{pair.who}\n{pair.near}", fontsize=6.5, color="crimson" if pair.flagged else "black", pad=2)
