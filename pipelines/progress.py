"""Progress in plain words: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("brickyard.train")


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
