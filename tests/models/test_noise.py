"""Noise is addressed: the same in every batch, different at every address, and normal."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from models.noise import normal, words
from models.philox import philox_4x32

SHAPES = [(), (1,), (3,), (4,), (5, 7), (1, 8, 8), (3, 9, 5), (3, 32, 32)]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 37])
def test_an_image_has_the_same_noise_bit_for_bit_in_every_batch(shape, batch):
    position = 1000 + torch.arange(37)
    whole = normal(7, "eps", position, shape, step=2)
    parts = [normal(7, "eps", part, shape, step=2) for part in position.split(batch)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_of_the_batch_does_not_matter():
    position = torch.arange(64)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(7, "eps", position[shuffled], (3, 5)), normal(7, "eps", position, (3, 5))[shuffled])


def test_a_repeated_position_repeats_its_noise():
    a, b = normal(7, "eps", torch.tensor([5, 5]), (1, 8, 8))
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_float32_of_the_asked_shape(shape):
    z = normal(0, "eps", torch.arange(3), shape)
    assert z.shape == (3, *shape)
    assert z.dtype == torch.float32


def test_an_empty_batch_has_no_noise():
    assert normal(0, "eps", torch.empty(0, dtype=torch.int64), (1, 8, 8)).shape == (0, 1, 8, 8)


def test_the_words_are_philox_of_block_position_and_step():
    seed, stream, step, blocks = -3, "eps", 0xFFFFFFFF, 3
    positions = [0, 1, (1 << 32) - 1, 1 << 32, (5 << 32) + 9, (1 << 63) - 1]
    drawn = words(seed, stream, torch.tensor(positions), step, blocks)  # four of [6, 3]
    key = hashlib.blake2b(b"eps\x00-3", digest_size=8).digest()
    key = (int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little"))
    for i, position in enumerate(positions):
        for block in range(blocks):
            counter = (block, position % (1 << 32), position // (1 << 32), step)
            assert tuple(int(word[i, block]) for word in drawn) == philox_4x32(counter, key)


def test_the_normals_are_box_muller_of_the_words():
    """By the logarithm, sine and cosine of another library, as another device has others, rounded once at the end."""
    position = torch.arange(4096)
    drawn = [word.numpy().astype(float) for word in words(1, "eps", position, step=3, blocks=8)]
    expected = np.empty((4096, 32))
    for pair in range(2):
        radius = np.sqrt(-2 * np.log((drawn[2 * pair] + 0.5) / 2**32))
        angle = 2 * math.pi * drawn[2 * pair + 1] / 2**32
        expected[:, 2 * pair :: 4], expected[:, 2 * pair + 1 :: 4] = radius * np.cos(angle), radius * np.sin(angle)
    differ = normal(1, "eps", position, (32,), step=3).numpy() != expected.astype(np.float32)
    assert differ.sum() <= 2  # of 131,072; in single precision it would be most of them


ADDRESSES = {
    "another seed": {"seed": 12},
    "the opposite seed": {"seed": -11},
    "another stream": {"stream": "z"},
    "another step": {"step": 1},
    "the last step": {"step": (1 << 32) - 1},
    "the next position": {"first": 1},
    "a position 2**32 later": {"first": 1 << 32},
    "a position 2**40 later": {"first": 1 << 40},
    "a position 2**62 later": {"first": 1 << 62},
}


@pytest.mark.parametrize("change", ADDRESSES.values(), ids=ADDRESSES.keys())
def test_another_address_has_other_and_uncorrelated_noise(change):
    def draw(seed=11, stream="eps", first=0, step=0):
        return normal(seed, stream, first + torch.arange(2000), (1, 4, 4), step)

    a, b = draw(), draw(**change)
    assert not (a == b).flatten(1).all(1).any()
    assert (a == b).float().mean() < 1e-3
    bound = 5 / math.sqrt(a.numel())
    assert abs(correlation(a, b)) < bound
    assert abs(correlation(a.square(), b.square())) < bound


def test_the_pixels_of_an_image_are_uncorrelated():
    z = normal(2, "eps", torch.arange(20_000), (12,)).double()
    bound = 5 / math.sqrt(len(z))
    for values in (z, z.square()):  # the two normals of one pair share a radius: their squares would show it
        assert (torch.corrcoef(values.T) - torch.eye(12)).abs().max() < bound


def test_noise_has_the_moments_of_a_normal():
    z = normal(3, "eps", torch.arange(1000), (1, 16, 16)).double().flatten()
    n = len(z)
    # Five standard errors each: Var z = 1, Var z² = 2, Var z³ = 15, Var z⁴ = 96.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n)


@pytest.mark.parametrize("column", range(4))
def test_each_of_the_four_normals_of_a_block_is_normal_to_kolmogorov_and_smirnov(column):
    z = normal(4, "eps", torch.arange(50_000), (4,))[:, column]
    assert stats.kstest(z.double().numpy(), "norm").pvalue > 1e-3


def test_the_tails_are_there_and_finite():
    z = normal(5, "eps", torch.arange(2000), (1, 32, 32)).abs()
    assert torch.isfinite(z).all()
    beyond_four = int((z > 4).sum())
    expected = 2 * stats.norm.sf(4) * z.numel()
    assert abs(beyond_four - expected) < 5 * math.sqrt(expected)
    assert z.max() <= math.sqrt(2 * math.log(2**33))


@pytest.mark.parametrize(
    ("word", "position", "step", "block", "radius"),
    [
        (0, 4714682438749791380, 3752165424, 2, math.sqrt(2 * math.log(2**33))),
        (0xFFFFFFFF, 457114916860202718, 2259749912, 50, math.sqrt(-2 * math.log1p(-(2**-33)))),
    ],
)
def test_the_first_and_the_last_word_make_finite_normals(word, position, step, block, radius):
    # One word in 2³² is this one: the addresses were found by running Philox backwards.
    position = torch.tensor([position])
    assert int(words(0, "eps", position, step, block + 1)[0][0, block]) == word
    pair = normal(0, "eps", position, (4 * (block + 1),), step)[0, 4 * block : 4 * block + 2]
    assert float(pair.square().sum().sqrt()) == pytest.approx(radius, rel=1e-5)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    normal(0, "eps", torch.arange(4), (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
