"""The order of the images: position k of a run to a row of the data set, as a pure function of (seed, N, k).

Storage likes contiguous reads and training likes a thorough shuffle. So each epoch lays the chunks, runs of contiguous
rows, end to end in an order of its own, and then permutes the *places* of that line inside each window of positions.
Windows are cut where positions are multiples of their size and where an epoch ends, not where chunks do: so one task
reads one whole window, and a chunk is read by two tasks only where a cut goes through it. Both permutations are keyed
with the seed and the epoch and are evaluated where they are needed, so that reading anywhere in a run over 10⁹ images
takes the memory of one window.

Rows may be held out, for a loss on images that nothing was learned from. They lie evenly over the data set, so that
they stand for all of it also where it lies sorted, as the rows of a Parquet file or a tar may; and the rest is counted
so that chunks stay whole.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.philox import MASK, philox_4x32, stream_key
from pipelines.permutation import permute, unpermute

MAX_WINDOW_ROWS = 8192


@dataclass(frozen=True)
class Plan:
    """The order of every epoch. Epoch e is positions [en, (e+1)n), n = N - held_out: each row once but those that
    are held out, none dropped, none padded."""

    seed: int
    N: int
    """Rows of the data set."""
    chunk_rows: int
    """Contiguous rows that stay together until the shuffle inside a window; the rows of a row group."""
    window_rows: int
    """Positions that are shuffled into each other."""
    held_out: int = 0
    """Rows that are in no epoch."""

    @property
    def n(self) -> int:
        """Rows of an epoch."""
        return self.N - self.held_out

    @cached_property
    def held(self) -> NDArray[np.int64]:
        """The rows that are in no epoch, rising: int64 [held_out]."""
        return held_out_rows(self.N, self.held_out)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the data set's row for each position in [start, stop): int64 [stop - start]."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch = start // self.n
            first = epoch * self.n
            begin = max(start // self.window_rows * self.window_rows, first) - first
            end = min((start // self.window_rows + 1) * self.window_rows, first + self.n) - first
            until = min(stop - first, end)
            places = np.arange(start - first, until) - begin
            shuffled = begin + permute(places, end - begin, stream_key(self.seed, "rows"), (epoch, begin))
            parts.append(self._rows_at(epoch, shuffled))
            start = first + until
        return self._of_data_set(np.concatenate(parts))

    def _rows_at(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row, of those of an epoch, at each place of the line of chunks, whose last may be a short one."""
        chunks, key = -(-self.n // self.chunk_rows), stream_key(self.seed, "chunks")
        missing = chunks * self.chunk_rows - self.n
        short = int(unpermute(np.array([chunks - 1]), chunks, key, (epoch, 0))[0])  # where the short chunk stands
        behind = place >= (short + 1) * self.chunk_rows - missing
        padded = place + missing * behind  # as if it were a full one
        slot, which = np.unique(padded // self.chunk_rows, return_inverse=True)
        return permute(slot, chunks, key, (epoch, 0))[which] * self.chunk_rows + padded % self.chunk_rows  # type: ignore[no-any-return]

    def _of_data_set(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of the data set that each row of an epoch, 0..n-1, is.

        First come the chunks of which nothing is held out, as they lie; then what is left of the others.
        """
        if not self.held_out:
            return row
        size, broken = self.chunk_rows, np.unique(self.held // self.chunk_rows)
        in_broken = len(broken) * size - (-self.N % size if broken[-1] == (self.N - 1) // size else 0)
        is_whole, found = row < self.N - in_broken, np.empty_like(row)
        found[is_whole] = _without(broken, row[is_whole] // size) * size + row[is_whole] % size
        # The broken chunks, end to end, are a line in which the rows that are held out have places.
        taken = np.searchsorted(broken, self.held // size) * size + self.held % size
        place = _without(taken, row[~is_whole] - (self.N - in_broken))
        found[~is_whole] = broken[place // size] * size + place % size
        return found


def held_out_rows(N: int, count: int) -> NDArray[np.int64]:
    """Return the rows that are held out of N, rising: int64 [count], one of each of as many equal stretches.

    No seed decides which, so that all runs on a data set can be compared on the same ones.
    """
    starts = np.arange(count + 1) * N // max(count, 1)
    zero = np.zeros(count, np.int64)
    word = philox_4x32((np.arange(count), zero, zero, zero), stream_key(0, "held out"))[0]
    return starts[:-1] + (word * np.diff(starts) >> 32)  # type: ignore[no-any-return]


def _without(taken: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return number ``index`` of the numbers from 0 that are not taken (rising)."""
    return index + np.searchsorted(taken - np.arange(len(taken)), index, side="right")


def window_batches(window_bytes: int, row_bytes: int, batch_images: int) -> int:
    """Return how many global batches make a window: a power of two of at most so many stored bytes, and at least 1."""
    images = min(window_bytes // row_bytes, MAX_WINDOW_ROWS)
    return 1 << max(images // batch_images, 1).bit_length() - 1


def uniforms(seed: int, stream: str, position: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return two numbers in [0, 1) for each position (int64 [n]), of a named stream: float64 [n, 2]."""
    counter = (np.zeros_like(position), position & MASK, position >> 32, np.zeros_like(position))
    return np.stack(philox_4x32(counter, stream_key(seed, stream))[:2], axis=1) * 2.0**-32
