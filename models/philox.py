"""Philox-4x32-10: random bits as a function of (key, counter), the root of everything that a run draws.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). There is no state, so
there is nothing to save, to seed per rank or to replay: a draw is addressed, and any worker can make it.

Only operators are used, so that the same code serves int64 numpy arrays (the data plan) and int64 torch tensors on
any device (the noise). Every 32-bit word travels in an int64: a product of two words overflows the sign bit, which
two's complement wraps exactly, and the masks recover both halves.
"""

import hashlib
from typing import Any, TypeAlias

Words: TypeAlias = Any
"""An int64 numpy array or torch tensor (or a Python int beside one) with values in [0, 2**32)."""

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """Return the two key words of a named stream of a seed; streams of one seed are independent of each other."""
    digest = hashlib.blake2b(f"{stream}\0{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox_4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Encrypt four counter words (broadcast against each other) with two key words, in ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product_2 >> 32) & MASK) ^ c1 ^ k0, product_2 & MASK
        c2, c3 = ((product_0 >> 32) & MASK) ^ c3 ^ k1, product_0 & MASK
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3
