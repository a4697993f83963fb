"""Runs one contestant once and prints what that cost as a line of JSON: the measured process of ``compare.py``.

    python -m benchmarks.loaders.run MODULE NAME URL DECODER WORKERS EPOCH_IMAGES EPOCHS

It runs in the environment of its contestant, so it imports nothing that is not in all of them.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

from benchmarks.loaders.tree import cpu_seconds

SPAWNED = time.time()


def endless(loader: Any) -> Generator[Any, None, None]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


def main() -> None:
    """Take some epochs; those after the first are the steady state."""
    module, name, url, decoder, *numbers = sys.argv[1:]
    workers, epoch_images, epochs = map(int, numbers)
    contestants = importlib.import_module(f"benchmarks.loaders.{module}")
    with contestants.ready(name):
        opened = time.time()
        batches = endless(getattr(contestants, name)(url, decoder, workers))
        taken = len(next(batches)[0])
        came = time.time()
        taken += take(batches, epoch_images - taken)
        # Between two ends of epochs: whoever has read ahead at the one has done so at the other.
        turned, spent = time.time(), cpu_seconds(os.getpid())
        counted = take(batches, epochs * epoch_images - taken)
        ended, spent = time.time(), cpu_seconds(os.getpid()) - spent
        told = {
            "images_per_s": counted / (ended - turned),
            "early_images_per_s": taken / (turned - opened),
            "cpu_s": 1000 * spent / counted,
            "first_batch_s": came - opened,
            "ready_s": came - SPAWNED,
        }
        print(json.dumps(told), flush=True)
        batches.close()  # while its cluster is still there: Ray's iterators would start another one to say goodbye


def take(batches: Iterator[Any], images: int) -> int:
    """Take that many images, or a part of a batch more; return how many came."""
    taken = 0
    while taken < images:
        pixels = next(batches)[0]
        assert tuple(pixels.shape[1:]) == (64, 64, 3) and str(pixels.dtype).endswith("uint8"), pixels.shape
        taken += len(pixels)
    return taken


if __name__ == "__main__":
    main()
