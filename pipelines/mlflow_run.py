"""What a run holds, told to MLflow. Each thing may be told twice, since an answer can be lost after the deed: then
nothing changes. With :mod:`pipelines.mlflow_find`, :mod:`pipelines.mlflow_models` and :mod:`pipelines.mlflow_registry`,
all that imports MLflow.
"""

import io
import logging
import math
import posixpath
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from PIL import Image

from pipelines.entries import (
    Begin,
    DataSet,
    End,
    Entry,
    File,
    Metrics,
    Model,
    ModelInput,
    Parameters,
    Picture,
    Tags,
    Target,
)
from pipelines.mlflow_find import TAG, Finder, client, is_active, is_broken_off, is_refusal, with_tag
from pipelines.mlflow_models import record_data_set, record_model, record_model_input
from pipelines.spool import BATCH, FEW
from pipelines.storage import Folder

STARTS, DROPPED = "brickyard.starts", "brickyard.records_dropped"
IMAGES_TAG = "mlflow.loggedImages"
"""By this the UI knows that there are pictures."""
PARENT, CHILD_OF = "mlflow.parentRunId", "brickyard.parent"
TRAINING_PAGES = "workflowType=machine_learning"
"""Of the UI; those it opens otherwise are about conversations."""
THUMBNAIL = 256
"""Pixels along the long side of the picture that the UI shows in a grid."""
PROBES = 5
"""As many requests as an entry may need: a server that fails now and then fails one of them."""
RECORDERS: dict[type, Callable[..., None]] = {
    DataSet: record_data_set,
    Model: record_model,
    ModelInput: record_model_input,
}
KEY = re.compile(r"[\w./ -]+")
"""What the key of a picture may be made of."""
PICTURE = re.compile(r"images/(?P<key>[^+]+)\+step\+(?P<step>\d+)\+.*\+compressed\.webp")
T = TypeVar("T")

log = logging.getLogger("brickyard.tracking")


class MLflowRun:
    """The MLflow run of a target, found or made at the first entry.

    Args:
        target: which run, and where.
        home: the folder of the run, where its starters agree on one MLflow run.
    """

    def __init__(self, target: Target, home: Folder) -> None:
        self.run_id = ""
        """MLflow's, as soon as it is known."""
        self.recording_model = False
        """Whether a model is being recorded, which takes many requests and may be large."""
        self._target, self._home = target, home
        self._experiment = ""
        self._parameters: set[str] = set()
        self._on_record: dict[str, dict[int, float]] = {}
        """The newest value at each position of a metric, as far as they were looked up."""
        self._is_new = False
        self._said: set[str] = set()

    @property
    def url(self) -> str:
        """How to see the run: a command or an address; empty if that is not known yet."""
        uri = self._target.uri
        if not uri.startswith("http"):
            command = f"{Path(sys.prefix) / 'bin' / 'mlflow'} server --backend-store-uri {uri} --port 5000"
            return f"MLFLOW_DISABLE_TELEMETRY=true {command}"
        page = f"{uri}/#/experiments/{self._experiment}/runs/{self.run_id}?{TRAINING_PAGES}"
        return page if self.run_id else ""

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self._client, self._target, self._home)

    @cached_property
    def _client(self) -> MlflowClient:
        return client(self._target.uri)

    def take(self, entries: Sequence[Entry]) -> None:
        """Record entries: one, or several metrics.

        Raises:
            Exception: if they are not on record and may be later.
        """
        if not self.run_id:
            self._open(entries[0])
        match entries[0]:
            case Begin() as begin:
                self._begin(begin)
            case Parameters(values):
                new = [Param(key, value) for key, value in values.items() if key not in self._parameters]
                self._send(new, lambda some: self._log(params=some), lambda one: f"the parameter {one.key}", FEW)
                self._parameters |= values.keys()
            case Metrics():
                self._metrics([entry for entry in entries if isinstance(entry, Metrics)])
            case Tags(values, start):
                if not _is_past(self._look(), start):
                    self._tag(values)
            case Picture() as picture:
                self._send([picture], lambda some: self._picture(some[0]), lambda one: f"the picture {one.key}", 1)
            case File() as file:
                if _is_past(self._look(), file.start):
                    return
                self._send([file], lambda some: self._file(some[0].name, some[0].data), lambda one: one.name, 1)
            case DataSet() | Model() | ModelInput() as one:
                record = RECORDERS[type(one)]
                self.recording_model = isinstance(one, Model)
                try:
                    self._send([one], lambda some: record(self._client, self._look(), some[0]), _named, 1)
                finally:
                    self.recording_model = False
            case End() as end:
                self._end(end)

    def blames(self, entry: Entry, error: Exception) -> bool:
        """Return whether a failure is one of this entry: the connection held, and MLflow takes others of its kind, or
        has its files at hand, several times in a row."""
        if not self.run_id or is_broken_off(error):
            return False
        try:
            for _ in range(PROBES):
                if isinstance(entry, Picture | File):
                    self._client.list_artifacts(self.run_id)
                else:
                    self._log(tags=[RunTag(TAG, self._target.run_id)])
        except Exception:
            return False
        return True

    def _log(self, **values: list[Any]) -> None:
        self._client.log_batch(self.run_id, **values)

    def _send(self, values: list[T], call: Callable[[list[T]], object], name: Callable[[T], str], at_once: int) -> None:
        """Record values, as many at once as may be; of those that are refused only the bad ones are lost."""
        for start in range(0, len(values), at_once):
            some = values[start : start + at_once]
            try:
                call(some)
            except Exception as error:
                if not is_refusal(error):
                    raise
                if self._is_gone():
                    self._open()
                    raise  # to be asked again, of the run that there is now
                if len(some) > 1:
                    self._send(some, call, name, (len(some) + 1) // 2)
                elif name(some[0]) not in self._said:
                    self._said.add(name(some[0]))
                    log.warning("MLflow refuses %s, which is not on record: %s", name(some[0]), error)

    def _metrics(self, entries: list[Metrics]) -> None:
        new: dict[tuple[str, int], Metric] = {}
        for entry in entries:
            for key, value in entry.values.items():
                place, known = (key, entry.position), self._known(key).get(entry.position)
                before = new[place].value if place in new else known
                if before is None or (entry.anew and not math.isclose(before, value, rel_tol=1e-12)):
                    new[place] = Metric(key, value, entry.at_ms, entry.position)
        self._send(list(new.values()), lambda some: self._log(metrics=some), lambda one: f"the metric {one.key}", BATCH)
        for (key, position), metric in new.items():
            self._known(key)[position] = metric.value

    def _known(self, key: str) -> dict[int, float]:
        """Return what is on record of a metric, by position."""
        if key not in self._on_record:
            try:
                history = self._client.get_metric_history(self.run_id, key) if not self._is_new else []
            except Exception as error:
                if not is_refusal(error):  # a name that it does not know how to spell has no history
                    raise
                history = []
            self._on_record[key] = {metric.step: metric.value for metric in sorted(history, key=_time)}
        return self._on_record[key]

    def _picture(self, picture: Picture) -> None:
        """Record a picture as MLflow's own log_image does (3.17), but under a name that is always the same."""
        if not KEY.fullmatch(picture.key):
            log.warning("%r cannot be the key of a picture, which is not on record", picture.key)
            return
        key = picture.key.replace("/", "~")
        if picture.position in self._pictures.get(key, set()):
            return
        same = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._target.run_id}/{key}/{picture.position}")
        name = f"images/{key}+step+{picture.position}+timestamp+{picture.at_ms}+{same}"
        image = Image.open(io.BytesIO(picture.data))
        scale = THUMBNAIL / max(image.size)
        small = io.BytesIO()
        image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale)))).save(small, "WEBP")
        self._file(f"{name}.png", picture.data)
        self._file(f"{name}+compressed.webp", small.getvalue())
        self._tag({IMAGES_TAG: "True"})
        self._pictures.setdefault(key, set()).add(picture.position)

    @cached_property
    def _pictures(self) -> dict[str, set[int]]:
        """Positions of the pictures of each key that are on record, whole: the small one is written last."""
        known: dict[str, set[int]] = {}
        for file in self._client.list_artifacts(self.run_id, "images") if not self._is_new else []:
            if found := PICTURE.fullmatch(file.path):
                known.setdefault(found["key"], set()).add(int(found["step"]))
        return known

    def _file(self, name: str, data: bytes) -> None:
        folder, base = posixpath.split(name)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / base
            path.write_bytes(data)
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def _tag(self, values: dict[str, str]) -> None:
        tags = [RunTag(key, value) for key, value in values.items()]
        self._send(tags, lambda some: self._log(tags=some), lambda one: f"the tag {one.key}", FEW)

    def _begin(self, begin: Begin) -> None:
        run = self._look()
        if not _is_past(run, begin.start):
            self._tag({STARTS: str(begin.start)})
            self._client.update_run(self.run_id, status="RUNNING")
        self._join_parent(run)
        self._finder.remove_doubles(run)

    def _end(self, end: End) -> None:
        if end.dropped:
            self._tag({DROPPED: str(end.dropped)})
        run = self._look()
        self._join_parent(run)
        self._adopt(run)
        if not _is_past(run, end.start):
            self._client.set_terminated(self.run_id, end.status, end.at_ms)
        self._finder.remove_doubles(run)

    def _join_parent(self, run: Run) -> None:
        """Put the run below its parent, as soon as that is on record."""
        if self._target.parent and PARENT not in run.data.tags:
            self._tag({CHILD_OF: self._target.parent})
            for parent in with_tag(self._client, [run.info.experiment_id], self._target.parent)[:1]:
                self._tag({PARENT: parent.info.run_id})

    def _adopt(self, run: Run) -> None:
        """Put below the run those of its children that were on record before it."""
        for child in with_tag(self._client, [run.info.experiment_id], self._target.run_id, CHILD_OF):
            if PARENT not in child.data.tags:
                self._client.set_tag(child.info.run_id, PARENT, run.info.run_id)

    def _look(self) -> Run:
        """Return the run as it is now; it is found anew if it is gone."""
        run = self._finder.find(self.run_id)
        if run is None or not is_active(run):
            self._open()
            run = self._client.get_run(self.run_id)
        return run

    def _is_gone(self) -> bool:
        run = self._finder.find(self.run_id)
        return run is None or not is_active(run)

    def _open(self, first: Entry | None = None) -> None:
        """Find the run, or make it: then it has begun when its first entry says so, which may be a while ago."""
        self.run_id, self._on_record = "", {}
        self.__dict__.pop("_pictures", None)
        run, self._is_new = self._finder.open(first.at_ms if isinstance(first, Begin) else None)
        self._experiment, self._parameters = run.info.experiment_id, set(run.data.params)
        self.run_id = run.info.run_id


def _time(metric: Metric) -> int:
    return int(metric.timestamp)


def _named(one: DataSet | Model | ModelInput) -> str:
    return f"the {'data set' if isinstance(one, DataSet) else 'model'} {one.name}"


def _is_past(run: Run, start: int) -> bool:
    """Whether a run has started anew since: a spool may come late, from another machine."""
    return int(run.data.tags.get(STARTS, "0")) > start
