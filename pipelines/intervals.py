"""How far a value may be off for the chance of the draw: a jackknife over tenths of a set.

A set is cut into parts, evenly, in order, and part i is of tenth i mod 10. The value without each tenth tells how much
hangs on it (Tukey, 1958): SE² = (9/10) Σ (v₋ᵢ - v̄)². Nothing is drawn, so the interval is the same each time. Tenths
of samples are alike, since seeds are; those of a data set are if it was shuffled, as an ingest does.
"""

from collections.abc import Sequence

import numpy as np

TENTHS = 10
STUDENT = 2.2622
"""The 0.975 quantile of Student's distribution with nine degrees of freedom."""
PART_IMAGES, PART_BYTES = 4096, 64 << 20
"""What a task takes at most, in pictures and in bytes of pixels."""


def parts(n: int, picture_bytes: int) -> list[tuple[int, int]]:
    """Cut n pictures into parts [start, stop), as many of each tenth, or into few where n is too small for tenths."""
    if n < 2 * TENTHS:
        return [(0, n)]
    most = max(1, min(PART_IMAGES, PART_BYTES // picture_bytes))
    count = TENTHS * max(1, -(-n // (TENTHS * most)))
    return [(n * i // count, n * (i + 1) // count) for i in range(count)]


def standard_error(without: Sequence[float]) -> float:
    """Return the standard error of a value, of what it is without each tenth."""
    values = np.asarray(without)
    return float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))
