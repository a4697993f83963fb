import numpy as np
import pytest
from scipy.stats import t

from pipelines.intervals import PART_BYTES, PART_IMAGES, STUDENT, TENTHS, parts, standard_error
from pipelines.moments import Moments, frechet_distances, merged


@pytest.mark.parametrize("n", [1, 2, 19, 20, 25, 1797, 50_000, 1_234_567])
@pytest.mark.parametrize("picture_bytes", [64, 3072, 12 << 20])
def test_parts_lie_end_to_end_are_small_and_give_each_tenth_as_many(n: int, picture_bytes: int) -> None:
    bounds = parts(n, picture_bytes)
    assert [stop for _, stop in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert bounds[0][0] == 0 and bounds[-1][1] == n
    sizes = [stop - start for start, stop in bounds]
    assert min(sizes) >= 1
    if n >= 2 * TENTHS:
        assert len(bounds) % TENTHS == 0 and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= PART_IMAGES and (max(sizes) == 1 or max(sizes) * picture_bytes <= PART_BYTES + 12 << 20)


def test_the_error_of_a_mean_is_that_of_the_book() -> None:
    """Of tenths of equal size, a mean's jackknife is the deviation of their means over √10."""
    values = np.random.default_rng(0).normal(size=(10, 7))
    without = [np.delete(values, i, axis=0).mean() for i in range(10)]
    assert standard_error(without) == pytest.approx(values.mean(1).std(ddof=1) / np.sqrt(10), rel=1e-12)
    assert pytest.approx(t.ppf(0.975, 9), abs=1e-4) == STUDENT


def test_the_interval_of_a_distance_holds_what_it_says() -> None:
    """Of 300 sets of samples, about 95 % have an interval in which the mean over all sets lies."""
    rng = np.random.default_rng(1)
    D, n, sets = 4, 400, 300
    real = Moments.of(rng.normal(size=(4000, D)))
    found = []
    for _ in range(sets):
        tenths = [Moments.of(1.5 * rng.normal(size=(n // 10, D)) + 0.3) for _ in range(10)]
        without = (merged(tenths[:i] + tenths[i + 1 :]) for i in range(10))
        value, *others = frechet_distances([merged(tenths), *without], real)
        found.append((value, standard_error(others)))
    values, errors = np.array(found).T
    inside = np.abs(values - values.mean()) < STUDENT * errors
    assert 0.91 < inside.mean() < 0.99
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.15)
