import logging
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import TrackingConfig
from pipelines.errors import ConfigurationError
from pipelines.storage import Folder
from pipelines.tracking import NoTracker, open_tracker, record_score, resolve_uri, without_password

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # SQLAlchemy pools are closed at exit
]


def test_one_run_across_restarts(folder: Folder) -> None:
    from mlflow import MlflowClient

    config, run = TrackingConfig(), ("digits", "an id of ours")
    first = open_tracker(config, folder, *run, {"seed": 0, "long": "x" * 9000}, {"start": "1"})
    first.metrics({"loss": 0.5}, 100)
    first.metrics({"loss": 0.4}, 200)
    first.picture(np.zeros((8, 8, 1), np.uint8), "samples", 200)
    first.file("config.yaml", b"seed: 0")

    second = open_tracker(config, folder, *run, {"seed": 1, "workers": 2}, {"start": "2"})  # the first was killed
    second.metrics({"loss": 0.41}, 200)  # computed again after the last checkpoint
    second.metrics({"loss": 0.3}, 300)
    second.metrics({"frechet_distance": 0.03}, 300)
    second.finish("FINISHED")

    assert second.run_id == first.run_id
    other = open_tracker(config, folder, "digits", "another id", {}, {})  # somebody else's run of the same name
    assert other.run_id != first.run_id
    client = MlflowClient(tracking_uri=resolve_uri(config, folder))
    assert len(client.search_runs([client.get_experiment_by_name("brickyard").experiment_id])) == 2
    run_data = client.get_run(first.run_id)
    assert run_data.info.status == "FINISHED"
    assert run_data.info.run_name == "digits"
    assert run_data.data.params == {"seed": "0", "long": "x" * 500, "workers": "2"}
    assert run_data.data.tags["start"] == "2"
    history = client.get_metric_history(first.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(100, 0.5), (200, 0.4), (300, 0.3)]
    names = {file.path for file in client.list_artifacts(first.run_id)}
    assert {"config.yaml", "images"} <= names
    assert Path(folder.path("mlflow-artifacts")).is_dir()


def test_a_score_joins_a_run_that_has_ended(folder: Folder) -> None:
    from mlflow import MlflowClient

    tracker = open_tracker(TrackingConfig(), folder, "a", "id", {}, {})
    tracker.finish("FINISHED")
    uri = resolve_uri(TrackingConfig(), folder)
    assert record_score(uri, tracker.run_id, "frechet_distance", 0.03, 300)
    assert MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.metrics == {"frechet_distance": 0.03}
    assert not record_score("none", tracker.run_id, "frechet_distance", 0.03, 300)
    assert not record_score(uri, "no-such-run", "frechet_distance", 0.03, 300)


def test_a_server_that_refuses_costs_the_record_and_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(TrackingConfig(uri=uri), folder, "a", "id", {}, {})
    assert isinstance(tracker, NoTracker)
    assert time.monotonic() - began < 60  # a client left to itself tries for four minutes
    assert "nothing is recorded" in caplog.text
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")


def test_where_runs_go(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig(), folder) == f"sqlite:///{folder.path('mlflow.db')}"
    assert resolve_uri(TrackingConfig(uri="none"), folder) == "none"
    assert isinstance(open_tracker(TrackingConfig(uri="none"), folder, "a", "id", {}, {}), NoTracker)
    with pytest.raises(ConfigurationError, match=r"tracking\.uri is empty"):
        resolve_uri(TrackingConfig(), Folder("s3://bucket/x"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert resolve_uri(TrackingConfig(), folder) == "http://tracker:5000"


def test_passwords_are_not_kept() -> None:
    assert without_password("https://me:secret@host:5000/x?y=1") == "https://host:5000/x?y=1"
    assert without_password("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
    with pytest.raises(ConfigurationError, match=r"holds a password.*MLFLOW_TRACKING_PASSWORD") as caught:
        TrackingConfig(uri="https://me:secret@host:5000")
    assert "secret" not in str(caught.value)
