"""The record of runs: it goes into a spool on disk, and from there to MLflow behind everybody's back.

Nobody waits for a tracker: not a worker, since the driver alone records, and not the driver, since a record is written
to a local file (:mod:`pipelines.spool`) that a thread empties (:mod:`pipelines.delivery`). A server that is away costs
nothing but its users' patience: what it did not take is delivered when it is back, by this process, by the next start
of the run, or by ``jobs/replay.py``. :mod:`pipelines.mlflow_run` has what MLflow must be told.
"""

import logging
import os
import posixpath
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipelines import leftovers
from pipelines.delivery import Delivery
from pipelines.entries import (
    Begin,
    End,
    Entry,
    File,
    Metrics,
    Model,
    Parameters,
    Picture,
    Status,
    Tags,
    Target,
    without_password,
)
from pipelines.errors import ConfigurationError
from pipelines.images import Pixels, encode
from pipelines.mlflow_door import recipient_of
from pipelines.spool import BATCH, FEW, MB, Spool
from pipelines.storage import Folder
from pipelines.tracking_config import TrackingConfig

if TYPE_CHECKING:
    from pipelines.mlflow_run import MLflowRun

SERVER_PATIENCE_S, FILE_PATIENCE_S = 8.0, 60.0
"""For how long the end of a job waits for a tracker that takes nothing: a server, or a database on this machine."""
LONGEST_S, BYTES_PER_S = 60.0, 1e6
"""And for how long it waits for one that takes something, beside what that would need at this rate."""
MAX_PARAMETER_CHARS, MAX_TAG_CHARS = 6000, 8000
"""What MLflow keeps of a value."""

T = TypeVar("T")

log = logging.getLogger("brickyard.tracking")


class Tracker:
    """A recorded run. This one records nothing."""

    run_id = ""
    """Our own id of the run, by which the tracker knows it too."""
    uri = "none"
    """Of the tracker, without a password."""

    @property
    def tracker_id(self) -> str:
        """The tracker's own id of the run; empty as long as it is not known."""
        return ""

    @property
    def see(self) -> str:
        """How to see the run: a command or an address; or what to do so that it can be seen."""
        return ""

    def metrics(self, values: dict[str, float], position: int, anew: bool = False) -> None:
        """Record values at a position. Positions that are on record already are passed over, unless the values are to
        be recorded anew."""

    def picture(self, pixels: Pixels, key: str, position: int) -> None:
        """Record a picture, uint8 [H, W, C], at a position; the UI shows those of a key as a sequence."""

    def file(self, name: str, data: bytes) -> None:
        """Keep a file with the run, over one that had its name."""

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""

    def append(self, entry: Entry) -> None:
        """Record something else that a run may hold."""

    def finish(self, status: Status) -> None:
        """End the run; the same command opens it again."""


@contextmanager
def ending(tracker: Tracker) -> Iterator[None]:
    """End the run as this block ends: FINISHED, KILLED by an interrupt, or FAILED."""
    try:
        yield
    except KeyboardInterrupt:
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


def resolve_uri(config: TrackingConfig, root: Folder) -> str:
    """Return the tracking URI that a configuration means, or ``none``.

    Raises:
        ConfigurationError: if there is nothing to fall back on.
    """
    if uri := config.uri or os.environ.get("MLFLOW_TRACKING_URI", ""):
        return uri
    if not root.is_local:
        raise ConfigurationError(
            f"tracking.uri is empty, and the root {root.url} is no local folder for SQLite: give --tracking.uri "
            "http://host:5000, set MLFLOW_TRACKING_URI, or give --tracking.uri none"
        )
    return f"sqlite:///{root.path('mlflow.db')}"


def open_tracker(
    config: TrackingConfig,
    root: Folder,
    home: Folder,
    name: str,
    run_id: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    start: int = 1,
) -> Tracker:
    """Begin to record a start of a run. Waits for no tracker and never fails: it may return one that records nothing.

    Args:
        config: where.
        root: for SQLite, and for pictures and files beside it.
        home: the folder of the run.
        name: the run's name in MLflow; several may have it.
        run_id: our own id of the run, by which it is found again.
        parameters: recorded once; those that are on record already are left as they are.
        tags: set anew at each start.
        start: which start of the run this is, from 1; what comes late of an earlier one undoes nothing of it.
    """
    uri = resolve_uri(config, root)
    if uri == "none":
        return Tracker()
    artifacts = (root / "mlflow-artifacts").url if uri.startswith("sqlite:") else ""
    target = Target(
        uri=without_password(uri),
        experiment=config.experiment,
        artifacts=artifacts,
        name=name,
        run_id=run_id,
        parent=config.parent,
    )
    try:
        spool = Spool(leftovers.spool_path(home, target), target, config.spool_mb * MB)
        recipient = recipient_of(target, home)
    except Exception as error:  # whatever it is, the training goes on
        log.warning("nothing is recorded: %s: %s", type(error).__name__, error)
        return Tracker()
    tracker = SpooledTracker(spool, recipient, home, start)
    tracker.parameters(parameters)
    tracker.tags(tags)
    return tracker


class SpooledTracker(Tracker):
    """A run that is recorded in a spool, which is delivered to its recipient behind its back."""

    def __init__(self, spool: Spool, recipient: "MLflowRun", home: Folder, start: int) -> None:
        self.run_id, self.uri = spool.target.run_id, spool.target.uri
        self._spool, self._recipient, self._home = spool, recipient, home
        self._start = start
        self._said: set[str] = set()
        self._delivered = False
        self._models: list[Model] = []
        self.append(Begin(start, now_ms()))
        self._delivery = Delivery(spool, recipient, lambda: leftovers.brought(home, spool.target.key))

    @property
    def tracker_id(self) -> str:
        return self._recipient.run_id

    @property
    def see(self) -> str:
        return self._recipient.url if self._delivered else f"{leftovers.COMMAND} {self._home.url}"

    def metrics(self, values: dict[str, float], position: int, anew: bool = False) -> None:
        numbers = {}
        for key, value in values.items():
            try:
                numbers[str(key)] = float(value)
            except (TypeError, ValueError):
                self._say(f"metric {key}", "the metric %s is %r, which is no number, and is not on record", key, value)
        for some in _parts(numbers, BATCH):
            self.append(Metrics(some, int(position), now_ms(), anew))

    def picture(self, pixels: Pixels, key: str, position: int) -> None:
        data = encode(np.ascontiguousarray(pixels), "png")
        self.append(Picture(key, int(position), now_ms(), data))

    def file(self, name: str, data: bytes) -> None:
        if name.startswith(("/", "..")) or posixpath.normpath(name) != name:
            self._say(f"file {name}", "%r is no name below the files of a run, and is not on record", name)
        else:
            self.append(File(name, self._start, data))

    def parameters(self, values: dict[str, Any]) -> None:
        """Record settings; those that are on record already are left as they are."""
        for some in _parts(self._cut("parameter", values, MAX_PARAMETER_CHARS), FEW):
            self.append(Parameters(some))

    def tags(self, values: dict[str, str]) -> None:
        for some in _parts(self._cut("tag", values, MAX_TAG_CHARS), FEW):
            self.append(Tags(some, self._start))

    def append(self, entry: Entry) -> None:
        """Put an entry into the spool; one that does not fit is counted and said, once."""
        if isinstance(entry, Model):
            self._models.append(entry)  # to come last: it may take long, and the end of the run does not wait for it
        else:
            self._append(entry)

    def _append(self, entry: Entry) -> None:
        try:
            if not self._spool.append(entry):
                self._say(
                    "full",
                    "%s is full (tracking.spool_mb is %d): what does not fit any more is not on record",
                    self._spool.path, self._spool.max_bytes // MB,
                )  # fmt: skip
        except (sqlite3.Error, OSError) as error:
            self._say("failed", "%s takes no records, so they are lost: %s", self._spool.path, error)

    def finish(self, status: Status) -> None:
        try:
            dropped, size = self._spool.dropped(), self._spool.size_bytes()
        except sqlite3.Error:
            dropped, size = 0, 0
        self.append(End(status, now_ms(), self._start, dropped))
        for model in self._models:
            self._append(model)
        patience_s = FILE_PATIENCE_S if self._spool.target.uri.startswith("sqlite:") else SERVER_PATIENCE_S
        size += sum(model.size_bytes for model in self._models)
        # Who interrupts a job may end its process soon, and then what is left would stay on a disk that may go too.
        longest_s = patience_s if status == "KILLED" else LONGEST_S
        self._delivered = self._delivery.finish(patience_s, longest_s + size / BYTES_PER_S)
        if self._delivered:
            if self._delivery.ended:
                with suppress(sqlite3.Error):  # another process has its hands on it
                    self._spool.close()
            return
        where = leftovers.hand_on(self._spool, self._home)
        log.warning(
            "%s has not taken all of what is to be recorded; it waits in %s. The next start of the run "
            "delivers it, or: %s %s",
            self._spool.target.uri, where, leftovers.COMMAND, self._home.url,
        )  # fmt: skip

    def _cut(self, what: str, values: dict[str, Any], most: int) -> dict[str, str]:
        for key, value in values.items():
            if len(str(value)) > most:
                self._say(
                    f"{what} {key}", "the %s %s has %d characters; the first %d of them are recorded",
                    what, key, len(str(value)), most,
                )  # fmt: skip
        return {str(key): str(value)[:most] for key, value in values.items()}

    def _say(self, what: str, words: str, *values: object) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(words, *values)


def now_ms() -> int:
    """Return the time, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _parts(values: dict[str, T], most: int) -> Iterator[dict[str, T]]:
    """Yield the values, at most so many at a time."""
    items = list(values.items())
    for start in range(0, len(items), most):
        yield dict(items[start : start + most])
