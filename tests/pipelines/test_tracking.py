import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import leftovers, run_folder
from pipelines.champion import record_score
from pipelines.entries import Begin, End, Metrics, Status, Target, without_password
from pipelines.errors import ConfigurationError
from pipelines.replay import ReplayJob, dry_run, replay
from pipelines.spool import Spool
from pipelines.storage import Folder
from pipelines.tracking import Tracker, ending, now_ms, open_tracker, resolve_uri
from pipelines.tracking_config import TrackingConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # SQLAlchemy pools are closed at exit
]


def start(folder: Folder, run_id: str, parameters: dict[str, Any], tags: dict[str, str]) -> Tracker:
    return open_tracker(TrackingConfig(), folder, folder / "runs" / "digits", "digits", run_id, parameters, tags)


def test_one_run_across_restarts(folder: Folder) -> None:
    """In SQLite, as on a laptop; tests/pipelines/test_outage.py has a server."""
    from mlflow import MlflowClient

    first = start(folder, "an id of ours", {"seed": 0, "long": "x" * 9000}, {"start": "1"})
    first.metrics({"loss": 0.5}, 100)
    first.metrics({"loss": 0.4}, 200)
    first.picture(np.zeros((8, 8, 1), np.uint8), "samples", 200)
    first.file("config.yaml", b"seed: 0")
    first.finish("FAILED")

    second = start(folder, "an id of ours", {"seed": 1, "workers": 2}, {"start": "2"})
    second.metrics({"loss": 0.41}, 200)  # computed again after the last checkpoint
    second.metrics({"loss": 0.3}, 300)
    second.picture(np.ones((8, 8, 1), np.uint8), "samples", 200)
    for score in (0.03, 0.03, 0.02):  # of other samples, the last
        second.metrics({"frechet_distance": score}, 300, anew=True)
        time.sleep(0.002)  # of two of one moment MLflow shows the larger
    second.finish("FINISHED")

    assert second.run_id == first.run_id == "an id of ours" and second.tracker_id == first.tracker_id
    other = start(folder, "another id", {}, {})  # somebody else's run of the same name
    other.finish("FINISHED")
    assert other.tracker_id != first.tracker_id
    uri = resolve_uri(TrackingConfig(), folder)
    assert uri in second.see
    client = MlflowClient(tracking_uri=uri)
    assert len(client.search_runs([client.get_experiment_by_name("brickyard").experiment_id])) == 2
    run = client.get_run(second.tracker_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "digits")
    assert run.data.params == {"seed": "0", "long": "x" * 6000, "workers": "2"}
    assert run.data.tags["start"] == "2"
    history = client.get_metric_history(second.tracker_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(100, 0.5), (200, 0.4), (300, 0.3)]
    scores = client.get_metric_history(second.tracker_id, "frechet_distance")
    assert (
        sorted(metric.value for metric in scores) in ([0.02, 0.03], [0.02])
        and run.data.metrics["frechet_distance"] == 0.02
    )
    names = {file.path for file in client.list_artifacts(second.tracker_id)}
    assert {"config.yaml", "images"} <= names
    assert len(client.list_artifacts(second.tracker_id, "images")) == 2, "one picture and its small one"
    assert Path(folder.path("mlflow-artifacts")).is_dir()


LINEAGE = {"position": 300, "checkpoint_digest": "c", "data_digest": "d", "data_url": "file:///d"}


def test_a_score_joins_a_run_that_has_ended(folder: Folder) -> None:
    from mlflow import MlflowClient

    tracker = start(folder, "an id of ours", {}, {})
    tracker.finish("FINISHED")
    uri = resolve_uri(TrackingConfig(), folder)
    for run_id in (tracker.run_id, tracker.tracker_id):  # of older versions the checkpoints name MLflow's
        assert record_score(uri, run_id, "frechet_distance", 0.03, LINEAGE)
    client = MlflowClient(tracking_uri=uri)
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.tracker_id, "frechet_distance")] == [
        (300, 0.03)
    ]
    assert not record_score("none", tracker.run_id, "frechet_distance", 0.03, LINEAGE)
    assert not record_score(uri, "no-such-run", "frechet_distance", 0.03, LINEAGE)


def test_without_a_place_for_the_spool_nothing_is_recorded_and_that_is_said(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    Path(folder.path("runs")).mkdir(parents=True)
    Path(folder.path("runs/digits")).write_text("a file")
    tracker = start(folder, "an id of ours", {}, {})
    assert type(tracker) is Tracker and "nothing is recorded: NotADirectoryError" in caplog.text
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish("FINISHED")


def test_where_runs_go(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig(), folder) == f"sqlite:///{folder.path('mlflow.db')}"
    assert resolve_uri(TrackingConfig(uri="none"), folder) == "none"
    assert type(open_tracker(TrackingConfig(uri="none"), folder, folder / "a", "a", "id", {}, {})) is Tracker
    with pytest.raises(ConfigurationError, match=r"tracking\.uri is empty"):
        resolve_uri(TrackingConfig(), Folder("s3://bucket/x"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert resolve_uri(TrackingConfig(), folder) == "http://tracker:5000"


def test_passwords_are_not_kept() -> None:
    assert without_password("https://me:secret@host:5000/x?y=1") == "https://host:5000/x?y=1"
    assert without_password("postgresql://host/runs?password=a&user=b") == "postgresql://host/runs?user=b"
    assert without_password("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"
    with pytest.raises(ConfigurationError, match=r"holds a user or a password.*MLFLOW_TRACKING_PASSWORD") as caught:
        TrackingConfig(uri="https://me:secret@host:5000")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_run_ends_once_as_its_work_did(error: type[BaseException] | None) -> None:
    """An impatient user's Ctrl-C, while the end of a run waits for a server, takes nothing back."""
    ends = []

    class Waiting(Tracker):
        def finish(self, status: Status) -> None:
            ends.append(status)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ending(Waiting()):
        if error:
            raise error
    assert ends == ["FINISHED" if error is None else "KILLED" if error is KeyboardInterrupt else "FAILED"]


def test_a_damaged_spool_costs_what_it_held(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    uri = resolve_uri(TrackingConfig(), folder)
    homes = [folder / "runs" / name for name in ("damaged", "whole")]
    for home in homes:
        run_folder.claim(home, {})
        run_id = run_folder.run_id(home)
        target = Target(uri=uri, experiment="e", artifacts="", name=home.name, run_id=run_id)
        spool = Spool(leftovers.spool_path(home, target), target)
        for entry in (Begin(1, now_ms()), Metrics({"loss": 0.5}, 1, now_ms()), End("FINISHED", now_ms(), 1, 0)):
            spool.append(entry)
        spool.close()
    (path,) = leftovers.here(homes[0], run_folder.run_id(homes[0]))
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    job = ReplayJob(runs=tuple(home.url for home in homes))
    assert dry_run(job)["runs"] == {homes[0].url: 0, homes[1].url: 3}
    assert replay(job)["runs"] == {homes[0].url: 0, homes[1].url: 3}
    assert caplog.text.count("cannot be delivered") == 2 and path.read_bytes().startswith(b"not a database")
