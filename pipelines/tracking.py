"""The record of runs in MLflow: the only file that imports it.

One named run is one MLflow run, across restarts: it is found again by a tag with the id in the run's folder.
MLflow is spoken to from the driver alone, so that no worker ever waits for it; and a tracker that fails costs the
record, not the run: every call that fails is said once and passed over.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from pipelines.config import TrackingConfig
from pipelines.errors import ConfigurationError
from pipelines.images import Pixels
from pipelines.storage import Folder

TAG = "brickyard.run"
TIMEOUT_S = "5"
ATTEMPTS = "1"
MAX_PARAM_CHARS = 500

log = logging.getLogger("brickyard.tracking")
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """A recorded run."""

    run_id: str
    url: str
    """How to see the run: a command or an address."""

    def metrics(self, values: dict[str, float], position: int) -> None:
        """Record values at a position. Positions that are on record already are passed over."""

    def picture(self, pixels: Pixels, key: str, position: int) -> None:
        """Record a picture, uint8 [H, W, C], at a position; the UI shows those of a key as a sequence."""

    def file(self, name: str, data: bytes) -> None:
        """Keep a file with the run."""

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""

    def finish(self, status: Status) -> None:
        """End the run; the same command opens it again."""


class NoTracker:
    """Records nothing."""

    run_id = ""
    url = ""

    def metrics(self, values: dict[str, float], position: int) -> None: ...
    def picture(self, pixels: Pixels, key: str, position: int) -> None: ...
    def file(self, name: str, data: bytes) -> None: ...
    def tags(self, values: dict[str, str]) -> None: ...
    def finish(self, status: Status) -> None: ...


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
    config: TrackingConfig, root: Folder, name: str, run_id: str, parameters: dict[str, Any], tags: dict[str, str]
) -> Tracker:
    """Find or create the MLflow run of a run and set it RUNNING. Never fails: it may return a NoTracker.

    Args:
        config: where.
        root: for SQLite, and for pictures and files beside it.
        name: the run's name in MLflow; several may have it.
        run_id: our own id of the run, by which it is found again.
        parameters: logged once; those that are on record already are left as they are.
        tags: set anew at each start.
    """
    uri = resolve_uri(config, root)
    if uri == "none":
        return NoTracker()
    _be_brief()
    artifacts = (root / "mlflow-artifacts").url if uri.startswith("sqlite:") else None
    try:
        if uri.startswith("sqlite:///"):
            os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")), exist_ok=True)  # noqa: PTH103, PTH120
        return _MLflowTracker(uri, config.experiment, artifacts, (name, run_id), parameters, tags)
    except Exception as error:  # whatever the tracker has, the training goes on
        log.warning("MLflow at %s cannot be used, so nothing is recorded: %s", without_password(uri), error)
        return NoTracker()


def reach(uri: str) -> str:
    """Return what a tracking URI answers, in a few words, having changed nothing there."""
    if uri == "none":
        return "none"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{uri}, to be made"
    _be_brief()
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        return f"{without_password(uri)} does not answer, so nothing would be recorded: {error}"
    return f"{without_password(uri)} answers"


def record_score(uri: str, run_id: str, name: str, value: float, position: int) -> bool:
    """Write one score to a run that has ended. Return whether it was taken; a failing tracker is said, not raised."""
    if uri in ("", "none") or not run_id:
        return False
    _be_brief()
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).log_metric(run_id, name, value, step=position)
    except Exception as error:
        log.warning("MLflow at %s did not take the score: %s", without_password(uri), error)
        return False
    return True


def without_password(uri: str) -> str:
    """Return a URI that can be printed and kept: without the user and the password that it may carry."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _be_brief() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is sent anywhere unasked
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", ATTEMPTS)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", TIMEOUT_S)
    import mlflow  # noqa: F401  (it sets the level of its own log)

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _MLflowTracker:
    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: str | None,
        run: tuple[str, str],
        parameters: dict[str, Any],
        tags: dict[str, str],
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, ViewType

        self._client = MlflowClient(tracking_uri=uri)
        self._lock = threading.Lock()
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = (
            found.experiment_id if found else self._client.create_experiment(experiment, artifact_location=artifacts)
        )
        name, our_id = run
        same = self._client.search_runs(
            [experiment_id], f"tags.`{TAG}` = '{our_id}'", ViewType.ACTIVE_ONLY, max_results=1
        )
        self._known: dict[str, int] = {}  # the last position that is on record for each metric, as far as looked up
        self._resumed = bool(same)
        if same:
            self.run_id = same[0].info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            created = self._client.create_run(experiment_id, tags={TAG: our_id}, run_name=name)
            self.run_id = created.info.run_id
        self.url = (
            f"{uri}/#/experiments/{experiment_id}/runs/{self.run_id}"
            if uri.startswith("http")
            else f"{Path(sys.prefix) / 'bin' / 'mlflow'} server --backend-store-uri {uri} --port 5000"
        )
        known = same[0].data.params if same else {}
        # A parameter that may change between starts keeps its first value.
        new = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in parameters.items() if key not in known]
        self._try(lambda: self._client.log_batch(self.run_id, params=new))
        self.tags(tags)

    def metrics(self, values: dict[str, float], position: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        def record() -> None:
            now = get_current_time_millis()
            new = {name: value for name, value in values.items() if position > self._last_position(name)}
            self._client.log_batch(self.run_id, [Metric(name, value, now, position) for name, value in new.items()])
            self._known |= dict.fromkeys(new, position)

        self._try(record)

    def _last_position(self, name: str) -> int:
        if name not in self._known:
            history = self._client.get_metric_history(self.run_id, name) if self._resumed else []
            self._known[name] = max((metric.step for metric in history), default=-1)
        return self._known[name]

    def picture(self, pixels: Pixels, key: str, position: int) -> None:
        image = np.ascontiguousarray(pixels)
        self._try(lambda: self._client.log_image(self.run_id, image, key=key, step=position))

    def file(self, name: str, data: bytes) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            self._try(lambda: self._client.log_artifact(self.run_id, str(path)))

    def tags(self, values: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in values.items()]
        self._try(lambda: self._client.log_batch(self.run_id, tags=tags))

    def finish(self, status: Status) -> None:
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _try(self, call: Callable[[], object]) -> None:
        with self._lock:
            try:
                call()
            except Exception as error:  # the record is worth a warning, never a run
                log.warning("MLflow did not take a record: %s", error)
