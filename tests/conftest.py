import os
from collections.abc import Iterator

# Before Ray is imported: the tests are not its field study, and warnings of its own future are not ours to mend.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("brickyard", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("brickyard")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One Ray for the tests of a file; other files may start clusters of their own, one at a time."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits as uint8 [n, 8, 8, 1], and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target
