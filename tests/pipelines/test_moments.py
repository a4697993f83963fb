import numpy as np
import pytest
from scipy.linalg import sqrtm

from pipelines.errors import DataError
from pipelines.features import pixel_features
from pipelines.moments import Moments, frechet_distance, frechet_distances, merged


def correlated(rng: np.random.Generator, n: int, features: int) -> np.ndarray:
    return rng.normal(size=(n, features)) @ rng.normal(size=(features, features)) + rng.normal(size=features)


def test_merged_moments_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    features = correlated(rng, 1000, 7)
    found = merged(Moments.of(part) for part in np.array_split(features, [1, 3, 400]))
    np.testing.assert_allclose(found.mean, features.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), atol=1e-11)


def test_the_distance_agrees_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a, b = correlated(rng, 500, 12), correlated(rng, 700, 12)
    A, B = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)
    c = Moments.of(correlated(rng, 90, 12))
    one_by_one = [frechet_distance(other, Moments.of(b)) for other in (Moments.of(a), c)]
    assert frechet_distances(iter([Moments.of(a), c]), Moments.of(b)) == one_by_one


def test_the_distance_of_a_shift_and_a_stretch_is_known() -> None:
    a = np.random.default_rng(2).normal(size=(400, 5))
    shifted = Moments.of(a + 3)
    assert frechet_distance(Moments.of(a), shifted) == pytest.approx(5 * 9, rel=1e-9)
    stretched = Moments.of((a - a.mean(0)) * 2 + a.mean(0))  # each root of a variance doubles: d² = tr Σ
    assert frechet_distance(Moments.of(a), stretched) == pytest.approx(np.trace(np.cov(a.T)), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself(digits: tuple[np.ndarray, np.ndarray]) -> None:
    moments = Moments.of(pixel_features(digits[0]))  # several pixels are always black: a singular covariance
    assert abs(frechet_distance(moments, moments)) < 1e-6


def test_a_resample_of_the_digits_scores_what_was_measured_elsewhere(digits: tuple[np.ndarray, np.ndarray]) -> None:
    features = pixel_features(digits[0])
    rng = np.random.default_rng(0)
    real = Moments.of(features)
    scores = [frechet_distance(Moments.of(features[rng.integers(0, 1797, 1797)]), real) for _ in range(5)]
    assert np.mean(scores) == pytest.approx(0.017, abs=0.002)


def test_too_few_or_unlike_pictures_are_refused() -> None:
    some = Moments.of(np.zeros((3, 4)))
    for a, b in ((some, Moments.of(np.zeros((1, 4)))), (Moments.of(np.zeros((1, 4))), some)):
        with pytest.raises(DataError, match="at least two pictures"):
            frechet_distance(a, b)
    with pytest.raises(DataError, match="4 and 5 features"):
        frechet_distance(some, Moments.of(np.zeros((3, 5))))
