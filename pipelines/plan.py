"""The order of the images: position k of a run to a row of the data set, as a pure function of (seed, N, k).

Storage likes contiguous reads and training likes a thorough shuffle. So each epoch lays the chunks, runs of contiguous
rows, end to end in an order of its own, and then permutes the *places* of that line inside each window of positions.
Windows are cut where positions are multiples of their size and where an epoch ends, not where chunks do: so one task
reads one whole window, and a chunk is read by two tasks only where a cut goes through it. Both permutations are keyed
with the seed and the epoch and are evaluated where they are needed, so that reading anywhere in a run over 10⁹ images
takes the memory of one window.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.philox import MASK, philox_4x32, stream_key
from pipelines.permutation import permute, unpermute

MAX_WINDOW_ROWS = 8192


@dataclass(frozen=True)
class Plan:
    """The order of every epoch. Epoch e is positions [eN, (e+1)N): each row once, none dropped, none padded."""

    seed: int
    N: int
    """Rows of the data set."""
    chunk_rows: int
    """Contiguous rows that stay together until the shuffle inside a window; the rows of a row group."""
    window_rows: int
    """Positions that are shuffled into each other."""

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the data set's row for each position in [start, stop): int64 [stop - start]."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch = start // self.N
            first = epoch * self.N
            begin = max(start // self.window_rows * self.window_rows, first) - first
            end = min((start // self.window_rows + 1) * self.window_rows, first + self.N) - first
            until = min(stop - first, end)
            places = np.arange(start - first, until) - begin
            shuffled = begin + permute(places, end - begin, stream_key(self.seed, "rows"), (epoch, begin))
            parts.append(self._rows_at(epoch, shuffled))
            start = first + until
        return np.concatenate(parts)

    def _rows_at(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row at each place of the line of chunks: the last chunk of the data set may be a short one."""
        chunks, key = -(-self.N // self.chunk_rows), stream_key(self.seed, "chunks")
        missing = chunks * self.chunk_rows - self.N
        short = int(unpermute(np.array([chunks - 1]), chunks, key, (epoch, 0))[0])  # where the short chunk stands
        behind = place >= (short + 1) * self.chunk_rows - missing
        padded = place + missing * behind  # as if it were a full one
        slot, which = np.unique(padded // self.chunk_rows, return_inverse=True)
        return permute(slot, chunks, key, (epoch, 0))[which] * self.chunk_rows + padded % self.chunk_rows  # type: ignore[no-any-return]


def window_batches(window_bytes: int, row_bytes: int, batch_images: int) -> int:
    """Return how many global batches make a window: a power of two of at most so many stored bytes, and at least 1."""
    images = min(window_bytes // row_bytes, MAX_WINDOW_ROWS)
    return 1 << max(images // batch_images, 1).bit_length() - 1


def uniforms(seed: int, stream: str, position: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return two numbers in [0, 1) for each position (int64 [n]), of a named stream: float64 [n, 2]."""
    counter = (np.zeros_like(position), position & MASK, position >> 32, np.zeros_like(position))
    return np.stack(philox_4x32(counter, stream_key(seed, stream))[:2], axis=1) * 2.0**-32
