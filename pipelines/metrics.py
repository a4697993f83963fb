"""What a cluster's Prometheus sees of the jobs: each name, its unit and its meaning, once.

Whoever has such a number says it here, with the run that it is of; Ray's agent on that node serves it. Where Ray does
not run, nothing happens, and what is said to a metric never fails: nobody trains or draws for the sake of a figure.

A counter is served as long as the node lives; of what a worker counts in the seconds before it is ended a part may be
lost. A gauge Ray serves for 20 s after it was set, so it is set again and again while the job is at work on the run. Of
a process that is dead there is no gauge, and rules ask for its last word. That is why times are told as times, from
which an age can be made afterwards, and why the end of a job has one.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

TAG = "run"
"""The one tag: the name of a run, or of a folder of samples; of a schedule's slots, that of the folder they lie in."""
AGAIN_S = 2.0
"""Between two times that a gauge is set."""

log = logging.getLogger("brickyard.metrics")


@dataclass(frozen=True)
class Metric:
    """A metric by its name at Ray, and what it says."""

    name: str
    help: str
    kind: str = ""
    """The class of ``ray.util.metrics``."""
    suffix: str = ""

    @property
    def exported(self) -> str:
        """Its name at Prometheus."""
        return f"ray_{self.name}{self.suffix}"

    @cached_property
    def _ray(self) -> Any:
        import ray.util.metrics

        return getattr(ray.util.metrics, self.kind)(self.name, self.help, tag_keys=(TAG,))

    def _say(self, how: str, run: str, value: float) -> bool:
        """Tell Ray, if it runs; return whether it was told. Called by who holds the lock."""
        ray = sys.modules.get("ray")
        try:
            if _hushed or not ray or not ray.is_initialized():
                return False
            getattr(self._ray, how)(float(value), {TAG: run})
        except Exception as error:  # whatever it is
            log.debug("%s is not told: %s", self.name, error)
            return False
        return True


@dataclass(frozen=True)
class Gauge(Metric):
    """What is now."""

    kind: str = "Gauge"

    def set(self, run: str, value: float) -> None:
        """Say what it is, from now on."""
        with _lock:
            if self._say("set", run, value):
                _values[self, run] = value
        _say_again()


@dataclass(frozen=True)
class Counter(Metric):
    """What has been, in all; it has no series before there is any of it."""

    kind: str = "Counter"
    suffix: str = "_total"

    def add(self, run: str, amount: float) -> None:
        """Count some more."""
        if amount > 0:  # Ray takes no other
            with _lock:
                self._say("inc", run, amount)


_lock = threading.Lock()
_values: dict[tuple[Gauge, str], float] = {}
"""What is said again and again, by metric and run."""
_hushed = False


@cache
def _say_again() -> None:
    """Begin to say all of it again and again, in a thread of this process."""

    def run() -> None:
        while True:
            time.sleep(AGAIN_S)
            with _lock:
                for (gauge, run), value in _values.items():
                    gauge._say("set", run, value)

    threading.Thread(target=run, name="metrics", daemon=True).start()


@contextmanager
def hushed() -> Iterator[None]:
    """Within this context nobody speaks to Ray, which is about to end; what was said it hands on by itself.

    There are threads that have something to say to the end: no call of theirs is on its way, and none begins.
    """
    global _hushed  # noqa: PLW0603
    with _lock:
        _hushed = True
        _values.clear()
    try:
        yield
    finally:
        with _lock:
            _hushed = False


STARTED = Gauge("brickyard_start_time_seconds", "Unix time at which the job that works on the run has started.")
ENDED = Gauge("brickyard_end_time_seconds", "Unix time at which a job has finished the run; one that fails says none.")

IMAGES = Counter("brickyard_images", "Images trained on, those that are trained on again after a crash among them.")
POSITION = Gauge("brickyard_position_images", "Images that the run has seen, by its last report.")
LENGTH = Gauge("brickyard_length_images", "Images that the run is to see.")
RATE = Gauge("brickyard_images_per_second", "Images trained on per second between the last two reports.")
DATA_WAIT = Gauge("brickyard_data_wait_ratio", "Share of that time for which the first worker waited for images, 0..1.")
CHECKPOINT = Gauge(
    "brickyard_checkpoint_time_seconds",
    "Unix time of the run's newest complete checkpoint; of the first start of the run, until it has one.",
)
CHECKPOINT_TOOK = Gauge("brickyard_checkpoint_seconds", "Time that the newest checkpoint took until it was complete.")
CHECKPOINT_STALL = Counter("brickyard_checkpoint_stall_seconds", "Time that training stood still for checkpoints.")
WORKER_STARTS = Counter("brickyard_worker_starts", "Starts of the run's group of workers: the first, and each restart.")
QUARANTINED = Counter("brickyard_quarantined_images", "Unusable images, in whose place another was trained on.")
STORAGE_RETRIES = Counter("brickyard_storage_retries", "Requests of training to storage that had to be repeated.")

SAMPLES = Counter("brickyard_samples", "Samples drawn and written.")
SAMPLES_LEFT = Gauge("brickyard_samples_left", "Samples that are still to be drawn.")

SPOOL = Gauge("brickyard_spool_bytes", "Size of what waits to be recorded, by the name that the tracker knows it by.")

METRICS: tuple[Metric, ...] = tuple(metric for metric in list(vars().values()) if isinstance(metric, Metric))
"""All of them."""


@contextmanager
def at_work(run: str) -> Iterator[None]:
    """Say when a job begins to work on a run, and when it has finished it: an error, or a signal, is no end.

    After it nothing more is said of the run.
    """
    STARTED.set(run, time.time())
    try:
        yield
    finally:
        with _lock:
            for key in [key for key in _values if key[1] == run]:
                del _values[key]
    ENDED.set(run, time.time())
