import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from models.philox import stream_key
from pipelines.permutation import permute, unpermute

KEY = stream_key(0, "test")


@given(n=st.integers(1, 3000), tweak=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
def test_it_is_a_bijection_and_its_inverse_undoes_it(n: int, tweak: tuple[int, int]) -> None:
    index = np.arange(n)
    image = permute(index, n, KEY, tweak)
    assert sorted(image) == list(index)
    assert np.array_equal(unpermute(image, n, KEY, tweak), index)


def test_numpy_and_torch_agree() -> None:
    index = np.arange(1000)
    assert np.array_equal(permute(index, 1000, KEY), permute(torch.from_numpy(index), 1000, KEY).numpy())


def test_any_index_of_a_huge_domain_is_read_on_its_own() -> None:
    n = 10**12
    index = np.array([0, 1, n // 2, n - 1])
    image = permute(index, n, KEY)
    assert ((image >= 0) & (image < n)).all()
    assert permute(index[2:3], n, KEY)[0] == image[2]
    assert np.array_equal(unpermute(image, n, KEY), index)


@pytest.mark.parametrize("n", [6, 7])
def test_over_many_keys_every_pair_of_images_is_equally_likely(n: int) -> None:
    draws = 60 * n * (n - 1)
    pairs = np.zeros((n, n))
    for tweak in range(draws):
        first, second = permute(np.array([0, 1]), n, KEY, (tweak, 0))
        pairs[first, second] += 1
    assert pairs.diagonal().sum() == 0
    assert chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-3
