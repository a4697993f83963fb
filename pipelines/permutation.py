"""A keyed permutation of 0..n-1 that is read at any index without being built.

An alternating Feistel network over a grid of a × b ≥ n cells: write an index as (row, column), then in turn shift the
row by a keyed function of the column, modulo a, and the column by one of the row, modulo b. Each shift can be undone,
so the whole is a bijection of the grid; an index that lands beyond n is sent on until it lands inside ("cycle
walking", Black and Rogaway 2002), which keeps it a bijection of 0..n-1. With a ≈ b ≈ √n few ever walk.
"""

import math

from models.philox import Words, philox_4x32

_SHIFTS = 12
"""Shifts of a row or a column in turn."""


def permute(index: Words, n: int, key: tuple[int, int], tweak: tuple[int, int] = (0, 0)) -> Words:
    """Return π(index) for an int64 numpy array or torch tensor with values in [0, n), in O(len(index)) memory.

    ``tweak`` names one permutation among those of a key: two numbers in [0, 2**32).
    """
    return _walk(index, n, key, tweak, range(_SHIFTS), sign=1)


def unpermute(index: Words, n: int, key: tuple[int, int], tweak: tuple[int, int] = (0, 0)) -> Words:
    """Return π⁻¹(index): the place that ``permute`` sends to ``index``."""
    return _walk(index, n, key, tweak, range(_SHIFTS)[::-1], sign=-1)


def _walk(index: Words, n: int, key: tuple[int, int], tweak: tuple[int, int], shifts: range, sign: int) -> Words:
    assert 1 <= n < 1 << 62, n
    image = _shift_all(index, n, key, tweak, shifts, sign)
    while (outside := image >= n).any():
        image[outside] = _shift_all(image[outside], n, key, tweak, shifts, sign)
    return image


def _shift_all(index: Words, n: int, key: tuple[int, int], tweak: tuple[int, int], shifts: range, sign: int) -> Words:
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    row, column = index // b, index % b  # both below 2**31: one counter word each
    for shift in shifts:
        if shift % 2 == 0:
            row = (row + sign * philox_4x32((column, shift, *tweak), key)[0]) % a
        else:
            column = (column + sign * philox_4x32((row, shift, *tweak), key)[0]) % b
    return row * b + column
