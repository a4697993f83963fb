import numpy as np

from pipelines.audit_pictures import Pair, closest_samples, pairs_of_samples
from pipelines.audit_report import Twins


def test_a_pair_of_samples_shows_the_distance_between_its_two() -> None:
    """The nearest to 2 is 0, whose own nearest is 1; and 4 and 5 are each other's, near to one of them only."""
    twins = Twins(
        other=np.array([1, 0, 0, -1, 5, 4]),
        distance=np.array([1.0, 1.0, 7.0, np.inf, 3.0, 3.0]),
        same=np.full(6, -1),
        near=np.array([True, False, False, False, False, True]),
    )
    drawn = {i: np.full((2, 2, 1), i, np.uint8) for i in range(6)}
    seed = np.arange(100, 106)
    found = pairs_of_samples(closest_samples(twins, 9), seed, drawn)
    assert [(int(pair.left[0, 0, 0]), int(pair.right[0, 0, 0]), *pair[2:]) for pair in found] == [
        (0, 1, "seed 100 | seed 101", "d 1", True),
        (4, 5, "seed 104 | seed 105", "d 3", True),
        (0, 2, "seed 100 | seed 102", "d 7", False),
    ]
    assert all(isinstance(pair, Pair) for pair in found) and len(closest_samples(twins, 2)) == 2
