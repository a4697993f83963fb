"""The order of the images: position k of a run to a row of the data set, as a pure function of (seed, N, k).

Storage likes contiguous reads and training likes a thorough shuffle. So each epoch permutes the chunks, runs of
contiguous rows, and then permutes the rows inside each window of several chunks. Both permutations are keyed with the
seed and the epoch and are evaluated where they are needed, so that reading anywhere in a run over 10⁹ images takes the
memory of one window.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.philox import stream_key
from pipelines.permutation import permute, unpermute


@dataclass(frozen=True)
class Plan:
    """The order of every epoch. Epoch e is positions [eN, (e+1)N): each row once, none dropped, none padded."""

    seed: int
    N: int
    """Rows of the data set."""
    chunk_rows: int
    """Contiguous rows that stay together until the shuffle inside a window; the rows of a row group."""
    window_chunks: int
    """Chunks that are shuffled into each other."""

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the data set's row for each position in [start, stop): int64 [stop - start]."""
        parts = [np.empty(0, np.int64)]
        for epoch in range(start // self.N, -(-stop // self.N)):
            first, last = max(start - epoch * self.N, 0), min(stop - epoch * self.N, self.N)
            parts += self._rows_of_epoch(epoch, first, last)
        return np.concatenate(parts)

    def _rows_of_epoch(self, epoch: int, first: int, last: int) -> list[NDArray[np.int64]]:
        parts, window = [], self._window_at(epoch, first)
        while first < last:
            begin, end = self._window_start(epoch, window), self._window_start(epoch, window + 1)
            places = np.arange(first - begin, min(last, end) - begin)
            shuffled = permute(places, end - begin, stream_key(self.seed, "rows"), (epoch, window))
            parts.append(self._rows_of_window(epoch, window)[shuffled])
            first, window = end, window + 1
        return parts

    @property
    def _chunks(self) -> int:
        return -(-self.N // self.chunk_rows)

    def _chunk_order(self, slots: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        chunks: NDArray[np.int64] = permute(slots, self._chunks, stream_key(self.seed, "chunks"), (epoch, 0))
        return chunks

    def _rows_of_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The rows of a window's chunks, chunk after chunk: the last chunk of the data set may be a short one."""
        first = window * self.window_chunks
        chunks = self._chunk_order(np.arange(first, min(first + self.window_chunks, self._chunks)), epoch)
        rows = (chunks[:, None] * self.chunk_rows + np.arange(self.chunk_rows)).ravel()
        return rows[rows < self.N]

    def _window_start(self, epoch: int, window: int) -> int:
        """The position within the epoch at which a window starts, given where the short chunk has gone."""
        if window * self.window_chunks >= self._chunks:
            return self.N
        last = np.array([self._chunks - 1])
        slot = int(unpermute(last, self._chunks, stream_key(self.seed, "chunks"), (epoch, 0))[0])
        missing = self._chunks * self.chunk_rows - self.N
        return window * self.window_chunks * self.chunk_rows - missing * (slot < window * self.window_chunks)

    def _window_at(self, epoch: int, position: int) -> int:
        window = position // (self.window_chunks * self.chunk_rows)
        return window + (position >= self._window_start(epoch, window + 1))
