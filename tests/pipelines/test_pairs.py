import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from prdc import compute_prdc
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from pipelines import pairs
from pipelines.pairs import Blocks, Tables, across, own

Sets = tuple[np.ndarray, np.ndarray]


def blocks(features: np.ndarray, at: list[int]) -> Blocks[np.ndarray]:
    return Blocks(np.split(features, at), lambda block: block)


@pytest.fixture(params=[1024, 7], ids=["whole tables", "small tables"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "ROWS", request.param)


def sets(seed: int = 0) -> Sets:
    """Samples that differ from the reference, as float32, as features are kept."""
    rng = np.random.default_rng(seed)
    a, b = 0.8 * rng.normal(size=(90, 6)) + 0.3, rng.normal(size=(70, 6))
    return a.astype(np.float32), b.astype(np.float32)


def measure(a: np.ndarray, b: np.ndarray, k: int, cuts: tuple[list[int], list[int]] = ([30, 60], [50])) -> Tables:
    """What pipelines.pair_scores does, without Ray."""
    samples, reference = blocks(a, cuts[0]), blocks(b, cuts[1])
    of_samples = [own(samples, i, k, kernel=True) for i in range(len(samples))]
    of_reference = [own(reference, i, k, kernel=True) for i in range(len(reference))]
    limits = Blocks([one.limit for one in of_reference], lambda limit: limit)
    found = [across(samples[i], reference, limits, of_samples[i].limit, kernel=True) for i in range(len(samples))]
    within = np.stack([one.kernel for one in of_samples])
    return Tables(np.arange(len(samples)), within, sum(one.kernel.sum() for one in of_reference), found, len(b))


def unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """The peer: scikit-learn's kernel, all pairs at once."""
    aa, bb, ab = (polynomial_kernel(x, y, degree=3, gamma=None, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1)) - 2 * ab.mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_shares_are_those_of_the_authors_code(k: int, rows: None) -> None:
    a, b = sets()
    tables = measure(a, b, k)
    with redirect_stdout(io.StringIO()):
        expected = compute_prdc(real_features=b.astype(np.float64), fake_features=a.astype(np.float64), nearest_k=k)
    found = [tables.precision(), tables.recall(), tables.density(k), tables.coverage()]
    names = ("precision", "recall", "density", "coverage")
    assert found == pytest.approx([expected[name] for name in names], rel=1e-12)
    assert 0 < min(found) < max(found) < 1.5, "none of them is a trivial one"


def test_the_balls_reach_to_the_nearest_neighbours_of_scikit_learn(rows: None) -> None:
    a, _ = sets()
    found = np.concatenate([own(blocks(a, [30, 60]), i, 4, kernel=False).limit for i in range(3)])
    distances, _ = NearestNeighbors(n_neighbors=5).fit(a.astype(np.float64)).kneighbors(a.astype(np.float64))
    np.testing.assert_allclose(found, np.square(distances[:, 4]), rtol=1e-8)  # the first is the picture itself


def test_the_kernel_distance_is_that_of_all_pairs_at_once(rows: None) -> None:
    a, b = sets()
    tables = measure(a, b, 1)
    assert tables.kid() == pytest.approx(unbiased_mmd(a.astype(np.float64), b.astype(np.float64)), rel=1e-11)


def test_how_the_sets_are_cut_changes_nothing() -> None:
    a, b = sets()
    whole, cut = measure(a, b, 3, ([], [])), measure(a, b, 3, ([1, 2, 50], [3, 69]))
    assert cut.kid() == pytest.approx(whole.kid(), rel=1e-11)
    for name in ("precision", "recall", "coverage"):
        assert getattr(cut, name)() == getattr(whole, name)()


def test_the_kernel_distance_has_no_bias_and_its_error_is_the_spread() -> None:
    """Over draws of two sets of one distribution its mean is 0, however small the sets."""
    rng = np.random.default_rng(2)
    found = [measure(rng.normal(size=(12, 3)), rng.normal(size=(9, 3)), 1, ([6], [4])).kid() for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_without_a_tenth_is_a_set_that_never_had_it() -> None:
    a, b = sets()
    tables, k = measure(a, b, 3), 3
    less = measure(np.concatenate([a[:30], a[60:]]), b, k, ([30], [50]))
    assert tables.kid(1) == pytest.approx(less.kid(), rel=1e-11)
    assert tables.precision(1) == less.precision()
    assert tables.density(k, 1) == less.density(k)
    assert tables.coverage(1) == less.coverage()


def test_a_set_held_against_itself_lies_in_its_balls_and_on_their_borders() -> None:
    """Each picture is in its own ball and in those of which it is the border: rounding must not push it out."""
    rng = np.random.default_rng(3)
    a = (1000 + rng.normal(size=(60, 300))).astype(np.float32)  # far from 0, where d² loses digits
    found = measure(a, a, 5, ([17, 40], [29]))
    assert (found.precision(), found.recall(), found.coverage()) == (1, 1, 1)
    assert found.density(5) == pytest.approx(6 / 5, abs=1e-12)


def test_copies_are_neighbours_at_no_distance() -> None:
    a, b = sets()
    twice = np.concatenate([b, b])
    tables = measure(a, twice, 1, ([30], [70]))
    assert tables.precision() == tables.coverage() == 0, "the balls of copies have no size"
    assert measure(b, twice, 1, ([30], [70])).precision() == 1
