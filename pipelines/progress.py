"""Progress in plain words: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("brickyard.train")

SAY_EVERY_S = 5.0
"""Between two lines of an ingest."""


class TrainingProgress:
    """Says how far a run is; ``close`` it at the end."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._bar: Progress | None = None
        self._started: tuple[float, int] | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("train"), BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
            )
            self._task = self._bar.add_task("starting workers", total=images)
            self._bar.start()

    def update(self, position: int, metrics: dict[str, float]) -> None:
        """Take the metrics of the loop at a position."""
        now = time.monotonic()
        speed = metrics["images_per_s"]
        if self._started is None:
            self._started = (now, position)
        elif now > self._started[0]:
            speed = (position - self._started[1]) / (now - self._started[0])
        minutes = (self._images - position) / speed / 60 if speed > 0 else float("inf")
        words = (
            f"{position:,} of {self._images:,} images · {metrics['images_per_s']:,.0f} img/s · "
            f"loss {metrics['loss']:.4f} · data wait {metrics['data_wait_percent']:.0f} % · {minutes:.1f} min left"
        )
        if self._bar:
            self._bar.update(self._task, completed=position, description=words)
        else:
            log.info("%s", words)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()


class IngestProgress:
    """Says in a line now and then how far an ingest is; the bytes of its parts tell what is left."""

    def __init__(self, part_bytes: dict[int, int]) -> None:
        self._left, self._all = dict(part_bytes), max(1, sum(part_bytes.values()))
        self._images, self._bad = 0, 0
        self._began = self._said = time.monotonic()

    def update(self, part: int, images: int, bad: int) -> None:
        """Take what became of a part."""
        self._images, self._bad = self._images + images, self._bad + bad
        del self._left[part]
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S and self._left:
            return
        self._said, seconds = now, max(now - self._began, 1e-3)
        left = sum(self._left.values())
        minutes = seconds * left / max(self._all - left, 1) / 60
        words = (
            f"{self._images:,} images · {self._images / seconds:,.0f} images/s · {self._bad:,} quarantined · "
            f"{100 * (1 - left / self._all):.0f} % of the bytes · {minutes:.1f} min left"
        )
        logging.getLogger("brickyard.ingest").info("%s", words)


class SampleProgress:
    """Says in a line now and then how far a sampling job is."""

    def __init__(self, images: int) -> None:
        self._images, self._drawn = images, 0
        self._began = self._said = time.monotonic()

    def update(self, images: int) -> None:
        """Take what a shard has added."""
        self._drawn += images
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S and self._drawn < self._images:
            return
        self._said, speed = now, self._drawn / max(now - self._began, 1e-3)
        minutes = (self._images - self._drawn) / speed / 60 if speed else float("inf")
        logging.getLogger("brickyard.sampling").info(
            "%s of %s images · %s images/s · %.1f min left",
            f"{self._drawn:,}", f"{self._images:,}", f"{speed:,.0f}", minutes,
        )  # fmt: skip
