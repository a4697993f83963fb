"""What the benchmarks share: the digits in memory, micro-batches without a stream, two clocks, figures in words."""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.fit import State
from pipelines.fit_config import FitConfig
from pipelines.plan import Plan

CHUNK_ROWS, WINDOW_ROWS = 128, 8192
"""Of the plan: as the preset `digits` has them, so that every epoch is shuffled as a whole."""


class MicroBatch(NamedTuple):
    """What the loop asks of a batch."""

    position: NDArray[np.int64]
    label: NDArray[np.int64]
    image: NDArray[np.uint8]
    replaced: int = 0
    retried: int = 0


@functools.cache
def digits() -> NDArray[np.uint8]:
    """Return the 1,797 digits as the demo writes them: uint8 [1797, 8, 8, 1]."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]


def micro_batches(pixels: NDArray[np.uint8], config: FitConfig, seed: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a run of one worker, in the order of its plan, out of memory."""
    plan = Plan(seed, len(pixels), CHUNK_ROWS, WINDOW_ROWS)
    for start in range(0, config.images, config.batch_images):
        rows = plan.rows(start, start + config.batch_images)
        for i in range(0, config.batch_images, config.micro_images):
            here = slice(i, i + config.micro_images)
            position = np.arange(start, start + config.batch_images)[here]
            yield MicroBatch(position, np.full(len(position), -1), pixels[rows[here]])


class Silent:
    """A listener of the loop who is asked nothing and told nothing."""

    def report(self, metrics: dict[str, float], position: int) -> None: ...
    def picture(self, pixels: Tensor, position: int) -> None: ...
    def checkpoint(self, state: State) -> None: ...
    def flush(self) -> None: ...
    def notice(self) -> bool:
        return False

    def leave(self, state: State) -> NoReturn:
        raise AssertionError("nobody asked to")


class Stopwatch:
    """Seconds on the wall and on the processor. On a machine with other guests the second is the fairer one."""

    def __init__(self) -> None:
        self._began = self._now()

    def read(self) -> NDArray[np.float64]:
        """Return wall seconds and CPU seconds."""
        return self._now() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count what happens within."""
        paused = self._now()
        yield
        self._began += self._now() - paused

    @staticmethod
    def _now() -> NDArray[np.float64]:
        return np.array([time.perf_counter(), time.process_time()])


def spread(values: Sequence[float], places: int = 3) -> str:
    """Return ``min / median / max``."""
    return " / ".join(f"{value:,.{places}f}" for value in (min(values), median(values), max(values)))
