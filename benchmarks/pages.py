"""The pages of MLflow that compare the children of a sweep, looked at by a browser: pictures for the documentation.

    python benchmarks/pages.py --sweep ~/brickyard/sweeps/article --run digits --register digits --out docs

Chromium must be installed; the server is that of MLFLOW_TRACKING_URI, with its user and password.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import tyro
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page

from pipelines import run_folder
from pipelines.mlflow_find import run_of
from pipelines.mlflow_run import PARENT, TRAINING_PAGES
from pipelines.scoring import METRIC
from pipelines.storage import Folder
from tests.server import browser

DRAWN_MS = 8_000
"""To wait for charts, which say nothing when they are drawn."""
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
STEPS = 3
"""Of the slider of samples, from the noise on."""
SHOWN = [f"metrics.`{METRIC}`", "metrics.`validation_loss`", "params.`schedule.kind`", "params.`schedule.T`",
         "params.`draw.sampler`", "params.`draw.steps`", "params.`fit.objective.loss`"]  # fmt: skip
"""Columns of the table of runs."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Take pictures of MLflow's pages."""

    sweep: str
    """Folder of the sweep."""
    run: str
    """Name of a run beside it, to be looked at."""
    register: str
    """The registered model that its children are versions of."""
    out: Path
    """Folder for the pictures."""


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """Return the runs of the children of a sweep that were scored, the best first."""
    words = f"tags.`{PARENT}` = '{parent.info.run_id}' AND metrics.`{METRIC}` > 0"
    return list(client.search_runs([parent.info.experiment_id], words, order_by=[f"metrics.`{METRIC}` ASC"]))


def open_page(page: Page, address: str, shown: str) -> None:
    """Open a page of the UI anew, and wait for some words on it."""
    page.goto("about:blank")  # pages differ in what follows #, so the browser would stay on the old one
    page.goto(f"/#/{address}{'&' if '?' in address else '?'}{TRAINING_PAGES}")
    page.get_by_text(shown, exact=False).first.wait_for()
    page.wait_for_timeout(DRAWN_MS)


def show_columns(page: Page, experiment: str) -> None:
    """Choose the columns of the table of runs, as a user does under "Columns"."""
    page.evaluate(
        """([experiment, columns]) => {
            const key = `MLflowLocalStorage-1.1-ExperimentPage-["${experiment}"]-ReactComponentState`;
            const state = JSON.parse(localStorage.getItem(key));
            localStorage.setItem(key, JSON.stringify({...state, selectedColumns: columns}));
        }""",
        [experiment, SHOWN],
    )


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.out.mkdir(parents=True, exist_ok=True)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = MlflowClient(uri)
    parent = run_of(client, run_folder.run_id(Folder(settings.sweep)))
    children, experiment = children_of(client, parent), parent.info.experiment_id
    (one,) = client.search_runs([experiment], f"attributes.run_name = '{settings.run}'")
    ids = quote(json.dumps([run.info.run_id for run in children[:4]]))
    by_score = f"orderByKey=metrics.%60{METRIC}%60&orderByAsc=true"
    with browser(uri, height=1000) as page:
        page.context.add_init_script(NO_ASSISTANT)

        def take(name: str) -> None:
            page.screenshot(path=settings.out / f"mlflow-{name}.png")

        open_page(page, f"experiments/{experiment}/runs?{by_score}", "article")
        show_columns(page, experiment)
        open_page(page, f"experiments/{experiment}/runs?{by_score}", "article")
        take("sweep")
        open_page(page, f"compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}", "Run details")
        page.get_by_text("Run details").scroll_into_view_if_needed()
        page.get_by_text("Show diff only").first.click()
        page.wait_for_timeout(DRAWN_MS)
        take("compare")
        open_page(page, f"experiments/{experiment}/runs/{one.info.run_id}", "fit.learning_rate")
        take("run")
        open_page(page, f"experiments/{experiment}/runs/{one.info.run_id}/model-metrics", "gradient_norm")
        take("metrics")
        card = page.get_by_text("samples", exact=True)
        while not card.count():  # charts are made as they come into sight
            page.mouse.move(800, 600)
            page.mouse.wheel(0, 500)
            page.wait_for_timeout(200)
        card.last.scroll_into_view_if_needed()
        box = card.last.bounding_box()
        assert box
        page.mouse.click(box["x"] + box["width"] + 20, box["y"] + box["height"] / 2)  # enlarges it
        for _ in range(STEPS):
            page.get_by_role("slider").last.press("ArrowRight")
        page.wait_for_timeout(DRAWN_MS)
        page.locator("[role=dialog] img").last.scroll_into_view_if_needed()  # below all settings of the run
        take("samples")
        open_page(page, f"models/{settings.register}", "candidate")
        take("model")


if __name__ == "__main__":
    main()
