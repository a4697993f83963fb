"""The published vectors, an implementation without overflow, and what a block cipher must do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.philox import philox_4x32, stream_key

KNOWN_ANSWERS = [  # philox4x32-10 in kat_vectors of Random123: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.one_of(st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))


def as_numpy(word):
    return np.array([word], dtype=np.int64)


def as_torch(word):
    return torch.tensor([word], dtype=torch.int64)


def encrypt(counter, key, kind):
    """Encrypt with words of a kind; Python integers come back."""
    words = philox_4x32(tuple(kind(word) for word in counter), key)
    return tuple(word if kind is int else word.item() for word in words)


@pytest.mark.parametrize("kind", [int, as_numpy, as_torch])
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_published_vectors_come_out(counter, key, result, kind):
    assert encrypt(counter, key, kind) == result


@settings(max_examples=200)
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_wrapping_int64_agrees_with_unbounded_integers(counter, key):
    unbounded = encrypt(counter, key, int)
    assert encrypt(counter, key, as_numpy) == unbounded
    assert encrypt(counter, key, as_torch) == unbounded


def test_counter_words_broadcast_against_each_other():
    rows, columns = torch.arange(3)[:, None], torch.arange(4)
    together = torch.stack(philox_4x32((columns, rows, rows, 5), (1, 2)))  # [4, 3, 4]
    for i in range(3):
        for j in range(4):
            assert tuple(together[:, i, j].tolist()) == philox_4x32((j, i, i, 5), (1, 2))


def test_different_counters_never_give_the_same_block():
    n = 1 << 16
    words = philox_4x32((torch.arange(n), 0, 0, 0), (3, 4))
    assert len(torch.stack(words, dim=1).unique(dim=0)) == n


def test_each_bit_of_counter_and_key_flips_half_of_the_result():
    n = 2000
    generator = np.random.default_rng(0)
    inputs = list(generator.integers(0, 1 << 32, size=(6, n)))

    def bits(inputs):
        result = np.stack(philox_4x32(tuple(inputs[:4]), (inputs[4], inputs[5])), axis=-1).astype(np.uint32)
        return np.unpackbits(result.view(np.uint8), axis=-1)  # [n, 128]

    before = bits(inputs)
    for place in range(6):
        for bit in range(32):
            changed = [word ^ (1 << bit) if i == place else word for i, word in enumerate(inputs)]
            share = (bits(changed) != before).mean(axis=0)  # [128]
            assert abs(share - 0.5).max() < 0.06  # five standard deviations of a mean of 2000 coins


def test_a_key_is_two_words():
    assert all(0 <= word < 1 << 32 for seed in range(-50, 50) for word in stream_key(seed, "eps"))


def test_streams_and_seeds_have_keys_of_their_own():
    names = [(seed, stream) for seed in (-1, 0, 1, 10, 1 << 70) for stream in ("", "t", "eps", "1", "eps 0")]
    assert len({stream_key(seed, stream) for seed, stream in names}) == len(names)
