"""Data sets, models and the champion, on a real server."""

import base64
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from pipelines import tracking
from pipelines.champion import promote, record_score
from pipelines.entries import DataSet, Model
from pipelines.errors import ConfigurationError, TryAgainError
from pipelines.replay import ReplayJob, replay
from pipelines.run_folder import RUN
from pipelines.storage import Folder
from pipelines.tracking import Tracker, now_ms, open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.faults.proxy import FaultProxy, Rule
from tests.server import deliver

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
        deliver(self.home, self.uri)  # on a busy machine the server may take its time
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
    record_score(mlflow_server, run.id, "frechet_distance", 0.05, run.score(0.05)["lineage"])  # of other seeds
    assert [m.value for m in client.get_metric_history(mlflow_id, "frechet_distance")] == [0.04, 0.05]
    assert client.get_run(mlflow_id).data.metrics["frechet_distance"] == 0.05


def test_it_is_kept_once_and_whole_by_a_server_whose_answers_are_lost(
    folder: Folder, mlflow_server: str, client: Any
) -> None:
    """Each second answer is lost after the deed: MLflow's client sends the request again, by itself."""
    name = f"digits-{uuid.uuid4().hex[:6]}"
    with FaultProxy(mlflow_server) as proxy:
        run = Run(folder, proxy.url)
        proxy.rules = [Rule("dropped", every=2)]
        mlflow_id = run.finish(DataSet("digits", DATA, "s3://bucket/digits", {}), run.model(register=name, loss=0.5))
        assert proxy.injected["dropped"] > 5
    mlflow_run = client.get_run(mlflow_id)
    (model,) = client.search_logged_models([mlflow_run.info.experiment_id], f"source_run_id = '{mlflow_id}'")
    assert model.status == "READY" and [(m.key, m.value) for m in model.metrics] == [("loss", 0.5)]
    assert [one.model_id for one in mlflow_run.outputs.model_outputs] == [model.model_id]
    assert len(mlflow_run.inputs.dataset_inputs) == 1
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert client.get_model_version_by_alias(name, "candidate").version == version.version


def test_the_server_answers_to_its_names_and_to_those_who_have_the_password(mlflow_server: str) -> None:
    def code(password: str = "", **headers: str) -> int:
        if password:
            user = os.environ["MLFLOW_TRACKING_USERNAME"]
            headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        request = Request(f"{mlflow_server}/api/2.0/mlflow/experiments/search?max_results=1", headers=headers)
        try:
            return int(urlopen(request).status)
        except HTTPError as error:
            return error.code

    password = os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert code(password) == 200
    assert code() == code(password + "?") == 401
    assert code(password, Host="elsewhere.example") == 403


def test_another_user_may_read_what_was_recorded_and_no_more(client: Any, mlflow_server: str, folder: Folder) -> None:
    Run(folder, mlflow_server).start().finish("FINISHED")

    def code(who: tuple[str, str], path: str, **body: str) -> int:
        data = json.dumps(body).encode() if body else None
        headers = {"Authorization": f"Basic {base64.b64encode(':'.join(who).encode()).decode()}"}
        headers["Content-Type"] = "application/json"
        try:
            return int(urlopen(Request(f"{mlflow_server}/api/2.0/mlflow/{path}", data, headers)).status)
        except HTTPError as error:
            return error.code

    admin = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    other = f"reader-{uuid.uuid4().hex}", uuid.uuid4().hex
    assert code(admin, "users/create", username=other[0], password=other[1]) == 200
    experiment = client.get_experiment_by_name("models").experiment_id
    assert code(other, f"experiments/get?experiment_id={experiment}") == 200
    assert code(other, "runs/create", experiment_id=experiment) == 403
    assert code(other, "experiments/delete", experiment_id=experiment) == 403
    assert code(admin, "runs/create", experiment_id=experiment) == 200


def test_a_server_without_users_too_answers_to_its_names_alone(mlflow_on_sqlite: str) -> None:
    """As `make ui` starts it: a page whose name leads to loopback by now is sent away."""
    url = f"{mlflow_on_sqlite}/api/2.0/mlflow/experiments/search?max_results=1"
    assert urlopen(url).status == 200
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(url, headers={"Host": "elsewhere.example"}))


def test_credentials_go_only_where_the_environment_says(
    folder: Folder, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write into a run's folder could have them sent elsewhere otherwise."""
    run = Run(folder, mlflow_server)
    monkeypatch.setattr(tracking, "SERVER_PATIENCE_S", 0.0)
    run.start().finish("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match=f"set MLFLOW_TRACKING_URI={mlflow_server} if it may have it"):
        replay(ReplayJob(runs=(run.home.url,)))
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(TryAgainError):
        replay(ReplayJob(runs=(run.home.url,), patience_s=1))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_password = secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))  # as pods of a cluster have them
    with pytest.raises(ConfigurationError, match="which would be sent the password"):
        replay(ReplayJob(runs=(run.home.url,)))


@pytest.mark.parametrize("draw", [{"weights": "last"}, {"ema_std": 0.1}])
def test_other_weights_than_those_of_the_model_are_not_promoted(
    folder: Folder, mlflow_server: str, client: Any, draw: dict[str, Any]
) -> None:
    run = Run(folder, mlflow_server)
    mlflow_id = run.finish(run.model())
    lineage = run.score(0.01)["lineage"] | {"draw": draw}
    promoted, why = run.promote(f"digits-{run.id[:6]}", 0.01, lineage=lineage)
    assert not promoted and "other weights than those of the model" in why
    record_score(mlflow_server, run.id, "frechet_distance", 0.01, lineage)
    run_of_it = client.get_run(mlflow_id)
    (model,) = client.search_logged_models([run_of_it.info.experiment_id], f"source_run_id = '{mlflow_id}'")
    assert run_of_it.data.metrics["frechet_distance"] == 0.01 and not model.metrics


def test_a_model_from_a_spool_that_was_tampered_with_is_refused(
    folder: Folder, mlflow_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(folder, mlflow_server)
    outside = Path(folder.path("outside"))
    model = replace(run.model(), files=["config.json", str(outside)])
    run.finish(model)
    assert "is no model of ours" in caplog.text and not outside.exists()


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
    tags = client.get_model_version(name, "2").tags
    assert float(tags["brickyard.score"]) == 0.04 and tags["brickyard.samples_n"] == "10"
    promoted, why = second.promote(name, 0.03, samples_n=20)
    assert promoted and "is 0.03; it was so already, with 0.04" in why, "the champion may set other terms"
    assert "samples_n 20, not 10" in first.promote(name, 0.01)[1]
    assert first.promote(name, 0.02, samples_n=20)[0] and champion() == "1"


def test_on_a_laptop_models_are_registered_and_promoted_too(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SQLite, named by a flag alone; nothing is left in the folder that the job was started in."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = set(tmp_path.iterdir())
    uri = f"sqlite:///{folder.path('mlflow.db')}"
    run = Run(folder, uri)
    run.finish(run.model(register="digits"))
    assert str(MlflowClient(uri).get_model_version_by_alias("digits", "candidate").version) == "1"
    assert run.promote("others", 0.05) == (True, "version 1 is the champion: frechet_distance is 0.05; "
                                           "there was no other champion")  # fmt: skip
    assert set(tmp_path.iterdir()) == before | {Path(folder.path())}


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
