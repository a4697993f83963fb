"""Data sets, models and the champion, on a real server."""

import json
import os
import uuid
from typing import Any

import pytest

from pipelines.champion import promote, record_score
from pipelines.entries import DataSet, Model
from pipelines.errors import ConfigurationError, TryAgainError
from pipelines.replay import ReplayJob, replay
from pipelines.run_folder import RUN
from pipelines.storage import Folder
from pipelines.tracking import Tracker, now_ms, open_tracker
from pipelines.tracking_config import TrackingConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DATA = "d" * 64
FILES = ("ema.safetensors", "config.json")


class Run:
    """A run at a server, with an export of its own."""

    def __init__(self, folder: Folder, uri: str, name: str = "digits", parent: str = "") -> None:
        self.home, self.uri, self.id = folder / "runs" / name, uri, uuid.uuid4().hex
        self.digest = uuid.uuid4().hex
        self.home.put(RUN, json.dumps({"id": self.id}).encode())
        self._root, self._name, self._parent = folder, name, parent
        self.files = {
            "ema.safetensors": b"weights",
            "config.json": json.dumps({"checkpoint_digest": self.digest}).encode(),
        }
        for file, data in self.files.items():
            (self.home / "export").put(file, data)

    def start(self) -> Tracker:
        config = TrackingConfig(uri=self.uri, experiment="models", parent=self._parent)
        return open_tracker(config, self._root, self.home, self._name, self.id, {}, {})

    def model(self, register: str = "", **metrics: float) -> Model:
        return Model(
            name=self._name, digest=self.digest, checkpoint=f"{self.home.url}/checkpoint-300",
            folder=(self.home / "export").url, files=list(FILES), size_bytes=9, position=300, at_ms=now_ms(),
            metrics=metrics, data_name="digits", data_digest=DATA, register=register,
        )  # fmt: skip

    def finish(self, *entries: Any, metrics: dict[str, float] | None = None) -> str:
        """Record a start from its beginning to its end; return MLflow's id of the run."""
        tracker = self.start()
        tracker.metrics(metrics or {}, 300)
        for entry in entries:
            tracker.append(entry)
        tracker.finish("FINISHED")
        replay(ReplayJob(runs=(self.home.url,), patience_s=120))  # on a busy machine the server may take its time
        assert tracker.tracker_id
        return tracker.tracker_id

    def score(self, value: float, **others: Any) -> dict[str, Any]:
        """What jobs/score.py finds."""
        lineage = {
            "checkpoint": f"{self.home.url}/checkpoint-300", "checkpoint_digest": self.digest, "position": 300,
            "data_digest": DATA, "data_url": "file:///digits", "draw": {"sampler": "ddim", "batch_images": 64},
        }  # fmt: skip
        terms = {"reference_digest": DATA, "features": "pixels", "samples_n": 10, "seeds": [0, 9]}
        return {"frechet_distance": value, "lineage": lineage} | terms | others

    def promote(self, name: str, value: float, **others: Any) -> tuple[bool, str]:
        found = promote(self.uri, self.id, name, self.score(value, **others), "frechet_distance")
        return found["promoted"], found["why"]


@pytest.fixture
def client(mlflow_server: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(mlflow_server)


def test_a_run_names_its_data_and_keeps_its_model_once(
    folder: Folder, mlflow_server: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder, mlflow_server, "rates.seed-0")
    data = DataSet("digits", DATA, "s3://bucket/digits", {"rows": 1797})
    for _ in range(2):  # as a second start says it again
        mlflow_id = run.finish(data, run.model(loss=0.5), metrics={"loss": 0.5})
    mlflow_run = client.get_run(mlflow_id)
    (one,) = mlflow_run.inputs.dataset_inputs
    assert (one.dataset.name, one.dataset.digest, one.dataset.source_type) == ("digits", DATA[:36], "s3")
    assert {tag.key: tag.value for tag in one.tags}["brickyard.digest"] == DATA

    (model,) = client.search_logged_models([mlflow_run.info.experiment_id], f"source_run_id = '{mlflow_id}'")
    assert (
        model.name == "rates-seed-0"
        and model.status == "READY"
        and model.params == {"images": "300", "data_digest": DATA}
    )
    assert [(m.key, m.value, m.step, m.dataset_digest) for m in model.metrics] == [("loss", 0.5, 300, DATA[:36])]
    assert [(output.model_id, output.step) for output in mlflow_run.outputs.model_outputs] == [(model.model_id, 300)]
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    there = mlflow.artifacts.download_artifacts(f"models:/{model.model_id}", dst_path=folder.path("downloaded"))
    assert {name: open(os.path.join(there, name), "rb").read() for name in FILES} == run.files  # noqa: PTH118, PTH123, SIM115

    assert len(client.get_metric_history(mlflow_id, "loss")) == 1, "that of the run is that of the model"
    record_score(mlflow_server, run.id, "frechet_distance", 0.04, run.score(0.04)["lineage"])
    assert len(client.get_metric_history(mlflow_id, "frechet_distance")) == 1
    record_score(mlflow_server, run.id, "frechet_distance", 0.04, run.score(0.04)["lineage"])
    (model,) = client.search_logged_models([mlflow_run.info.experiment_id], f"source_run_id = '{mlflow_id}'")
    assert sorted((m.key, m.value) for m in model.metrics) == [("frechet_distance", 0.04), ("loss", 0.5)]


def test_the_champion_is_the_best_of_those_that_were_scored_alike(
    folder: Folder, mlflow_server: str, client: Any
) -> None:
    name = f"digits-{uuid.uuid4().hex[:6]}"
    first, second = Run(folder, mlflow_server, "first"), Run(folder, mlflow_server, "second")
    first.finish(first.model(register=name))
    second.finish(second.model(register=name))
    assert client.get_model_version_by_alias(name, "candidate").version == "2"

    def champion() -> str:
        return str(client.get_model_version_by_alias(name, "champion").version)

    promoted, why = first.promote(name, 0.05)
    assert promoted and "there was no other champion" in why and champion() == "1"
    promoted, why = second.promote(name, 0.06)
    assert not promoted and why == "frechet_distance is 0.06; version 1, the champion, has 0.05"
    for others, said in (
        ({"samples_n": 20}, "samples_n 10, not 20"),
        ({"reference_digest": "e" * 64}, f'reference_digest "{DATA}", not "{"e" * 64}"'),
        ({"seeds": [10, 19]}, "seeds [0, 9], not [10, 19]"),
        ({"features": "inception"}, 'features "pixels", not "inception"'),
    ):
        promoted, why = second.promote(name, 0.01, **others)
        assert not promoted and said in why and champion() == "1", "not scored alike"
    assert not second.promote(name, float("nan"))[0]
    promoted, why = second.promote(name, 0.04)
    assert promoted and "is 0.04; version 1, the champion until now, has 0.05" in why and champion() == "2"
    assert second.promote(name, 0.04)[0] and champion() == "2", "as often as one likes"
    assert not second.promote(name, 0.01, samples_n=20)[0], "the champion's own terms stay"
    tags = client.get_model_version(name, "2").tags
    assert float(tags["brickyard.score"]) == 0.04 and tags["brickyard.samples_n"] == "10"


def test_a_model_is_not_recorded_of_an_export_that_is_another_by_now(
    folder: Folder, mlflow_server: str, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(folder, mlflow_server)
    model = run.model()
    (run.home / "export").put("config.json", b'{"checkpoint_digest": "of a later start"}')
    mlflow_id = run.finish(model)
    assert client.get_run(mlflow_id).info.status == "FINISHED"
    assert "holds another checkpoint by now (of a later start)" in caplog.text
    experiment = client.get_run(mlflow_id).info.experiment_id
    assert not client.search_logged_models([experiment], f"source_run_id = '{mlflow_id}'")


def test_what_cannot_be_promoted(folder: Folder, mlflow_server: str) -> None:
    run = Run(folder, mlflow_server)
    run.finish()  # without a model
    promoted, why = run.promote("digits", 0.01)
    assert not promoted and "MLflow has no model of" in why
    with pytest.raises(ConfigurationError, match="promote is 'digits'; the run that trained"):
        promote("none", run.id, "digits", run.score(0.01), "frechet_distance")
    with pytest.raises(TryAgainError, match="did not promote a version of 'digits'"):
        promote("http://127.0.0.1:9", run.id, "digits", run.score(0.01), "frechet_distance")


def test_a_child_lies_below_its_parent_whichever_is_on_record_first(
    folder: Folder, mlflow_server: str, client: Any
) -> None:
    parent = Run(folder, mlflow_server, "parent")
    child = Run(folder, mlflow_server, "child", parent=parent.id)
    first = child.finish()  # the whole child, before anything of the parent
    above = parent.finish()
    second = Run(folder, mlflow_server, "second", parent=parent.id)
    for mlflow_id in (first, second.finish()):
        assert client.get_run(mlflow_id).data.tags["mlflow.parentRunId"] == above
