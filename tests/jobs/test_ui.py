"""What a researcher sees who opens MLflow's pages in a browser: a real one, on the real server."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from playwright.sync_api import Page

from pipelines.entries import DataSet, Model
from pipelines.run_folder import RUN
from pipelines.storage import Folder
from pipelines.tracking import now_ms, open_tracker
from pipelines.tracking_config import TrackingConfig
from tests.server import browser, chromium, deliver

BRIGHTNESS = """wanted => [...document.images].some(image => {
    if (image.naturalWidth != 256) return false;
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.drawImage(image, 0, 0);
    return Math.abs(canvas.getImageData(9, 9, 1, 1).data[0] - wanted) < 9;
})"""
"""Whether one of the small pictures has this brightness."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def page(mlflow_server: str) -> Iterator[Page]:
    if not chromium() and not os.environ.get("CI"):
        pytest.skip("there is no Chromium: apt-get install chromium")
    with browser(mlflow_server, height=1400) as page:
        yield page


def record(
    folder: Folder, uri: str, name: str, learning_rate: str, loss: float, register: str = "", parent: str = ""
) -> str:
    """Record a run that has learned to a loss; return MLflow's id of it."""
    home, run_id = folder / "runs" / name, uuid.uuid4().hex
    home.put(RUN, json.dumps({"id": run_id}).encode())
    (home / "export").put("config.json", json.dumps({"checkpoint_digest": run_id}).encode())
    config = TrackingConfig(uri=uri, experiment="pages", parent=parent)
    tracker = open_tracker(config, folder, home, name, run_id, {"fit.learning_rate": learning_rate}, {"a": "tag"})
    tracker.append(DataSet("digits", "d" * 64, "s3://bucket/digits", {"rows": 1797}))
    tracker.picture(np.zeros((64, 64, 1), np.uint8), "samples", 0)
    for position in (100, 200):
        tracker.metrics({"loss": loss * 200 / position}, position)
        tracker.picture(np.full((64, 64, 1), position, np.uint8), "samples", position)
    tracker.append(
        Model(
            name=name,
            digest=run_id,
            checkpoint=home.url,
            folder=(home / "export").url,
            files=["config.json"],
            position=200,
            at_ms=now_ms(),
            metrics={"frechet_distance": loss / 2},
            data_name="digits",
            size_bytes=2,
            data_digest="d" * 64,
            register=register,
        )
    )
    tracker.finish("FINISHED")
    deliver(home, uri)
    assert tracker.tracker_id
    return tracker.tracker_id


def test_runs_can_be_compared_looked_at_and_followed_to_their_models(
    tmp_path: Path, mlflow_server: str, page: Page
) -> None:
    from mlflow import MlflowClient

    folder, registered = Folder(str(tmp_path)), f"digits-{uuid.uuid4().hex[:6]}"
    fast = record(folder, mlflow_server, "fast", "0.0021", 0.0832, registered)
    slow = record(folder, mlflow_server, "slow", "0.0007", 0.1234, registered)
    experiment = MlflowClient(mlflow_server).get_run(fast).info.experiment_id

    page.goto(f"/#/compare-runs?runs={quote(json.dumps([fast, slow]))}&experiments={quote(json.dumps([experiment]))}")
    for shown in ("fast", "slow", "0.0021", "0.0007", "0.083", "0.123"):
        page.get_by_text(shown, exact=False).first.wait_for()

    page.goto(f"/#/experiments/{experiment}/runs/{fast}")
    for shown in ("Finished", "digits (" + "d" * 36 + ")", registered, "fit.learning_rate", "0.0021"):
        page.get_by_text(shown, exact=False).first.wait_for()

    page.goto(f"/#/experiments/{experiment}/runs/{fast}/model-metrics")
    page.get_by_text("samples", exact=False).first.wait_for()  # with its slider over the positions

    page.goto(f"/#/models/{registered}")
    page.get_by_text("candidate", exact=False).first.wait_for()
    page.get_by_text("Version 2", exact=False).first.wait_for()


def test_a_sweep_is_a_tree_in_the_order_of_its_scores_with_pictures(
    tmp_path: Path, mlflow_server: str, page: Page
) -> None:
    folder, parent = Folder(str(tmp_path)), uuid.uuid4().hex
    home = folder / "sweeps" / "rates"
    home.put(RUN, json.dumps({"id": parent}).encode())
    sweep = open_tracker(TrackingConfig(uri=mlflow_server, experiment="pages"), folder, home, "rates", parent, {}, {})
    worse = record(folder, mlflow_server, "rates.worse", "0.1", 0.5, parent=parent)
    better = record(folder, mlflow_server, "rates.better", "0.2", 0.25, parent=parent)
    sweep.finish("FINISHED")
    deliver(home, mlflow_server)
    address, _, query = sweep.see.partition("?")
    assert query == "workflowType=machine_learning" and address.endswith(sweep.tracker_id)

    page.goto(sweep.see)
    page.get_by_text("Model training").first.wait_for()
    for shown in ("Child runs", "rates.better", "rates.worse"):
        page.get_by_text(shown, exact=False).first.wait_for()

    runs = address.partition("#")[2].rpartition("/")[0]
    page.goto("about:blank")
    page.goto(f"/#{runs}?orderByKey=metrics.%60loss%60&orderByAsc=true&{query}")
    rows = page.locator(f"a[href*='{better}'], a[href*='{worse}']")
    for each in (better, worse):
        page.locator(f"a[href*='{each}']").first.wait_for()
    shown = [name for row in rows.all() if (name := row.inner_text()).startswith("rates.")]
    assert shown == ["rates.better", "rates.worse"]

    page.goto("about:blank")
    page.goto(f"/#{runs}/{better}/model-metrics?{query}")
    card = page.get_by_text("samples", exact=True).first
    card.wait_for()
    card.scroll_into_view_if_needed()
    for brightness in (0, 100, 200):  # the slider begins with the first
        page.wait_for_function(BRIGHTNESS, arg=brightness)
        page.get_by_role("slider").last.press("ArrowRight")
