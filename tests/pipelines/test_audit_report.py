import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu

from pipelines.audit_report import by_label, group, judge, judge_twins, nearer, share, table
from pipelines.neighbours import Nearest


def found(*distances: list[float], same: list[int] | None = None) -> Nearest:
    squared = np.square(np.array(distances, float))
    rows = np.arange(squared.size).reshape(squared.shape)
    return Nearest(squared, rows, np.zeros(squared.shape, bool), np.array(same or [-1] * len(squared)))


def test_a_copy_is_much_nearer_to_one_image_than_to_those_around() -> None:
    judged = judge(found([1, 4, 4, 4], [3, 4, 4, 4], [0, 0, 0, 0], [2, 3, np.inf, np.inf]), 1 / 3)
    assert judged.around.tolist() == [3.25, 3.75, 0, 2.5]
    assert judged.ratio == pytest.approx([1 / 3.25, 3 / 3.75, 0, 0.8])
    assert judged.copy.tolist() == [True, False, True, False]


def test_the_same_pixels_are_a_copy_whatever_the_features_say() -> None:
    assert judge(found([1, 1.1], [1, 1.1], same=[-1, 4]), 1 / 3).copy.tolist() == [False, True]


def test_two_neighbours_and_a_half_are_the_third_of_the_second_nearest() -> None:
    first, second = np.random.default_rng(0).uniform(0.1, 1, (2, 1000))
    distances = np.sort(np.stack([first, second], 1), 1)
    third = distances[:, 0] < distances[:, 1] / 3
    assert 200 < third.sum() < 800 and (judge(found(*distances.tolist()), 0.5).copy == third).all()


def test_samples_that_are_all_alike_are_near_duplicates() -> None:
    """Measured on each other they would not be: each is as near to one as to all."""
    judged = judge(found(*[[8, 10, 12]] * 3), 1 / 3)
    assert judge_twins(found([0.1], [0.1], [0.1]), judged, 1 / 3).near.all()
    assert not judge_twins(found([4], [4], [4]), judged, 1 / 3).near.any()
    assert judge_twins(found([4], [4], [4], same=[1, 0, -1]), judged, 1 / 3).near.tolist() == [True, True, False]


@pytest.mark.parametrize(("count", "n"), [(0, 50), (1, 7), (31, 1797), (50, 50)])
def test_the_interval_is_that_of_scipy(count: int, n: int) -> None:
    told = share(np.arange(n) < count)
    interval = binomtest(count, n).proportion_ci(0.95, "wilson")
    assert told["interval_95"] == pytest.approx([interval.low, interval.high], abs=1e-6)
    assert (told["count"], told["share"]) == (count, pytest.approx(count / n))


def test_nearer_is_the_statistic_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(1)
    samples, control = rng.integers(0, 20, 300) / 4, rng.integers(3, 20, 200) / 4  # with many ties
    u = mannwhitneyu(control, samples).statistic
    assert nearer(samples, control) == pytest.approx(u / (300 * 200))
    assert nearer(control, control) == 0.5 and nearer(samples - 99, control) == 1


def test_what_is_told_of_a_group_and_of_each_label() -> None:
    judged = judge(found([1, 9], [8, 9], [1, 9], same=[-1, -1, 5]), 1 / 3)
    told = group(judged)
    assert (told["n"], told["copies"]["count"], told["identical"]) == (3, 2, 1)
    assert told["distance"]["least"] == 1 and told["distance"]["median"] == 1
    twins = judge_twins(found([9], [0], [0]), judged, 1 / 3)
    counts = by_label(np.array([1, 0, 1]), judged, twins, ["no", "yes"])
    assert counts == {
        "no": {"samples": 1, "copies": 0, "near_duplicates": 1},
        "yes": {"samples": 2, "copies": 2, "near_duplicates": 1},
    }
    assert by_label(np.full(3, -1), judged, twins, []) == {}


def test_a_sample_that_is_alone_has_nobody_beside_it() -> None:
    judged = judge(found([1, 2]), 1 / 3)
    rows = table(np.array([7]), np.array([-1]), judged, judge_twins(Nearest.none(1, 1), judged, 1 / 3)).to_pylist()[0]
    assert rows["nearest_seed"] is rows["nearest_seed_distance"] is rows["identical_seed"] is None
    assert (rows["seed"], rows["near_duplicate"], rows["identical_row"]) == (7, False, None)
